// Elements from text that may hold anything: text becomes text nodes, never markup.

export const $ = (id) => document.getElementById(id);

/** `tag` with attributes and children; a string child is text, null and undefined are left out. */
export function element(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same for SVG, whose elements live in a namespace of their own. */
export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** A bar of parts, each `[share, kind]` with its share (0..1) of the width. Decoration: the number stands beside it. */
export function bar(...parts) {
  const made = element("span", { class: "bar", "aria-hidden": "true" });
  for (const [share, kind] of parts) {
    const part = element("span", { class: kind });
    part.style.width = `${100 * Math.min(Math.max(share, 0), 1)}%`; // the CSSOM is outside style-src
    made.append(part);
  }
  return made;
}

export const number = (value) => value.toLocaleString("en");
export const percent = (share) => `${Math.round(100 * share)}\u00a0%`;
export const time = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(ms < 10000 ? 1 : 0)} s`);
export const plural = (count, thing) => `${number(count)} ${thing}${count === 1 ? "" : "s"}`;
