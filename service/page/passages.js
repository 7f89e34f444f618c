// Passages: from the text field to the request, and from the response to the list beside the answer.

import { bar, element, plural } from "./elements.js";
import { stateOf } from "./wording.js";

// How much of one embedding's attention a word needs for each of the three strengths of marks.
const STRENGTHS = [0.12, 0.3, 0.6];

/** Passages of the text field: separated by empty lines, a first line "# ..." is the title. */
export function parsePassages(text) {
  const blocks = text.split(/\n\s*\n/).map((block) => block.trim());
  return blocks.filter(Boolean).map((block) => {
    const title = /^#[ \t]*(.*)(?:\n|$)/.exec(block);
    return title ? { title: title[1].trim(), text: block.slice(title[0].length).trim() } : { title: "", text: block };
  });
}

/** The inverse, for the example. */
export function formatPassages(passages) {
  return passages.map(({ title, text }) => (title ? `# ${title}\n${text}` : text)).join("\n\n");
}

/** One item of the list: its relevance, how it was shown and why, and its words with the evidence marked. */
export function passageItem(sent, answered) {
  const { evidence, mode } = answered;
  const [state, why] = stateOf(answered);
  return element(
    "li",
    { class: `passage ${mode}` },
    element("h3", {}, ...marked(sent.title || `Passage ${answered.index + 1}`, sent.title ? "title" : null, evidence)),
    relevanceBar(answered.relevance),
    element("p", { class: "state" }, element("b", {}, state), why),
    element("p", { class: "passage-text" }, ...marked(sent.text, "text", evidence)),
    evidence && embeddingList(sent, evidence),
  );
}

/** In `auto`, a passage that stays text may never have been scored. */
function relevanceBar(relevance) {
  if (relevance === null) return element("p", { class: "relevance" }, "relevance not scored");
  return element("p", { class: "relevance" }, "relevance ", element("b", {}, relevance.toFixed(2)), bar([relevance, "fill"]));
}

/** `text` as text nodes and marks: each word as strong as its share of the embeddings' attention. */
function marked(text, field, evidence) {
  if (!evidence || !field) return [text];
  const segments = words(text);
  const heat = wordHeat(text, segments, evidence.flat().filter((span) => span.field === field));
  const strengths = heat.map((share) => STRENGTHS.filter((least) => share >= least).length);
  const nodes = [];
  segments.forEach(({ segment, isWordLike }, i) => {
    // What stands between two marked words belongs to the weaker of them.
    const strength = isWordLike ? strengths[i] : Math.min(strengths[i - 1] ?? 0, strengths[i + 1] ?? 0);
    const last = nodes.at(-1);
    if (!strength) nodes.push(segment);
    else if (last instanceof Element && last.className === `heat-${strength}`) last.append(segment);
    else nodes.push(element("mark", { class: `heat-${strength}` }, segment));
  });
  return nodes;
}

/** How many embeddings' worth of attention each segment has: a span's weight is shared by the words it touches. */
function wordHeat(text, segments, spans) {
  const heat = segments.map(() => 0);
  const place = codePointOffsets(text);
  for (const span of spans) {
    const touched = [];
    segments.forEach(({ segment, index, isWordLike }, i) => {
      if (isWordLike && index < place[span.end] && index + segment.length > place[span.start]) touched.push(i);
    });
    for (const i of touched) heat[i] += span.weight / touched.length;
  }
  return heat;
}

/** The API counts code points, strings here count UTF-16 units: the unit at which each code point begins. */
function codePointOffsets(text) {
  const offsets = [0];
  for (const character of text) offsets.push(offsets.at(-1) + character.length);
  return offsets;
}

/** `text` cut into words and what stands between them: `{segment, index, isWordLike}`. */
function words(text) {
  if (Intl.Segmenter) return [...new Intl.Segmenter(undefined, { granularity: "word" }).segment(text)];
  return [...text.matchAll(/\s+|\S+/g)].map(({ 0: segment, index }) => ({ segment, index, isWordLike: /\S/.test(segment) }));
}

/** What each embedding came from, in words; closed until someone wants to know. */
function embeddingList(sent, evidence) {
  const fields = { title: Array.from(sent.title), text: Array.from(sent.text) };
  const items = evidence.map((spans) =>
    element(
      "li",
      {},
      ...(spans.length ? spans.flatMap((span) => [source(fields, span), " "]) : [element("span", { class: "quiet" }, "spread thin")]),
    ),
  );
  const count = plural(items.length, "memory embedding");
  return element("details", {}, element("summary", {}, count), element("ol", { class: "embeddings" }, ...items));
}

function source(fields, span) {
  const words = fields[span.field].slice(span.start, span.end);
  const shown = words.length > 60 ? `${words.slice(0, 40).join("")} … ${words.slice(-16).join("")}` : words.join("");
  return element("span", { class: "source" }, element("q", {}, shown), ` ${span.weight.toFixed(2)}`);
}
