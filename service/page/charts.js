// Small lines of the metrics' history. Each says in words what it shows: its name, its last, lowest and highest value.

import { $, element, number, percent, svg, time } from "./elements.js";

const rate = (value) => value.toLocaleString("en", { maximumFractionDigits: value < 10 ? 2 : 0 });
const WIDTH = 100;
const HEIGHT = 30;
const SHORTEST_MS = 60000; // the least that the width stands for, so that a first minute grows instead of jumping

// Made once and then changed in place: what reads them aloud does not lose its place at every reading.
const charts = [
  chart("requests", "Requests/s", rate),
  chart("errors", "Errors/s", rate),
  chart("saved", "Prompt tokens saved", percent),
  chart("firstToken", "Time to first token, p50", (seconds) => time(1000 * seconds)),
  chart("inFlight", "Requests in flight", number),
  chart("reserved", "Reserved tokens", number),
];

/** Draw `points` as `history.js` hands them out. */
export function drawCharts(points) {
  const span = Math.max(SHORTEST_MS, points.length ? points.at(-1).at - points[0].at : 0);
  for (const { draw } of charts) draw(points, span);
  if (!$("charts").childElementCount) $("charts").append(...charts.map(({ figure }) => figure));
  const minutes = Math.round(span / 60000);
  $("history-note").textContent = points.length
    ? `The last ${minutes === 1 ? "minute" : `${minutes} minutes`}, read from /metrics every 5 seconds while this page is seen.`
    : "The first values come in 5 seconds.";
}

/** Say why there is nothing new; what was drawn stays. */
export function chartsProblem(words) {
  $("history-note").textContent = words;
}

/** The chart of one value of the points: its element, and how to draw it anew. */
function chart(name, title, show) {
  const last = element("b");
  const most = element("p", { class: "hint", "aria-hidden": "true" });
  const path = svg("path", { class: "line" });
  const box = { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" };
  const image = svg("svg", box, svg("path", { class: "base", d: `M0 ${HEIGHT}H${WIDTH}` }), path);
  const caption = element("figcaption", {}, element("span", {}, title), last);

  function draw(points, span) {
    const values = points.map((point) => point.values[name]).filter((value) => value !== null);
    const highest = Math.max(...values, 0);
    last.textContent = values.length ? show(values.at(-1)) : "–";
    most.textContent = values.length ? `up to ${show(highest)}` : "nothing yet";
    const words = `last ${last.textContent}, lowest ${show(Math.min(...values))}, highest ${show(highest)}`;
    image.setAttribute("aria-label", `${title}: ${values.length ? words : "nothing yet"}`);
    path.setAttribute("d", line(name, points, span, highest || 1));
  }

  return { figure: element("figure", { class: "chart" }, caption, image, most), draw };
}

/** The path through all points that have the value. Where nothing was answered there is none: it is not drawn as 0. */
function line(name, points, span, highest) {
  const end = points.at(-1)?.at;
  const places = points
    .filter(({ values }) => values[name] !== null)
    .map(({ at, values }) => {
      const x = WIDTH * (1 - (end - at) / span);
      const y = HEIGHT - 1 - (HEIGHT - 3) * (values[name] / highest);
      return `${x.toFixed(2)} ${y.toFixed(2)}`;
    });
  return places.length ? `M${places.join("L")}h0` : ""; // h0: one point alone is a dot
}
