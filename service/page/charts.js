// Small lines of the metrics' history. Each says in words what it shows: its name, now, lowest and highest.

import { $, element, number, percent, svg, time } from "./elements.js";

const rate = (value) => value.toLocaleString("en", { maximumFractionDigits: value < 10 ? 2 : 0 });
const CHARTS = [
  ["requests", "Requests/s", rate],
  ["errors", "Errors/s", rate],
  ["saved", "Prompt tokens saved", percent],
  ["firstToken", "Time to first token, p50", (seconds) => time(1000 * seconds)],
  ["inFlight", "Requests in flight", number],
  ["reserved", "Reserved tokens", number],
];
const WIDTH = 100;
const HEIGHT = 30;
const SHORTEST_MS = 60000; // the least that the width stands for, so that a first minute grows instead of jumping

/** Draw `points` as `history.js` hands them out. */
export function drawCharts(points) {
  const span = Math.max(SHORTEST_MS, points.length ? points.at(-1).at - points[0].at : 0);
  $("charts").replaceChildren(...CHARTS.map(([name, title, show]) => chart(name, title, show, points, span)));
  const minutes = Math.round(span / 60000);
  $("history-note").textContent = points.length
    ? `The last ${minutes === 1 ? "minute" : `${minutes} minutes`}, read from /metrics every 5 seconds while this page is seen.`
    : "The first values come in 5 seconds.";
}

/** Say why there is nothing new; what was drawn stays. */
export function chartsProblem(words) {
  $("history-note").textContent = words;
}

function chart(name, title, show, points, span) {
  const known = points.filter(({ values }) => values[name] !== null);
  const values = known.map((point) => point.values[name]);
  const most = Math.max(...values, 0);
  const now = values.length ? show(values.at(-1)) : "–";
  const range = values.length ? `, lowest ${show(Math.min(...values))}, highest ${show(most)}` : "";
  const words = values.length ? `${title}: last ${now}${range}` : `${title}: nothing yet`;
  return element(
    "figure",
    { class: "chart" },
    element("figcaption", {}, element("span", {}, title), element("b", {}, now)),
    svg(
      "svg",
      { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": words },
      svg("path", { class: "base", d: `M0 ${HEIGHT}H${WIDTH}` }),
      svg("path", { class: "line", d: line(name, points, span, most || 1) }),
    ),
    element("p", { class: "hint", "aria-hidden": "true" }, values.length ? `up to ${show(most)}` : "nothing yet"),
  );
}

/** The path of one line: broken where a value is missing, a dot where one stands alone. */
function line(name, points, span, most) {
  const end = points.at(-1)?.at;
  let path = "";
  let open = false;
  for (const { at, values } of points) {
    const value = values[name];
    if (value !== null) {
      const x = WIDTH * (1 - (end - at) / span);
      const y = HEIGHT - 1 - (HEIGHT - 3) * (value / most);
      path += `${open ? "L" : "M"}${x.toFixed(2)} ${y.toFixed(2)}${open ? "" : "h0"}`;
    }
    open = value !== null;
  }
  return path;
}
