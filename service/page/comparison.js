// The same question in the three modes, one after the other: tokens and time side by side.

import { post } from "./api.js";
import { bar, element, number, percent, time } from "./elements.js";

const MODES = [
  ["text", "as text"],
  ["hybrid", "hybrid"],
  ["compressed", "compressed"],
];

/** Ask in each mode and fill `rows` (a tbody). `body` is the request without its mode. Throws what `post` throws. */
export async function compare(rows, body, key, signal) {
  const results = new Map();
  draw(rows, results);
  for (const [mode] of MODES) {
    const response = await post("answer", { ...body, mode }, key, signal);
    results.set(mode, await response.json());
    draw(rows, results);
  }
}

function draw(rows, results) {
  const answers = [...results.values()];
  const most = {
    tokens: Math.max(...answers.map((answer) => answer.usage.text_tokens), 1),
    ms: Math.max(...answers.map((answer) => answer.timings_ms.total), 1),
  };
  rows.replaceChildren(...MODES.map(([mode, label]) => row(label, results.get(mode), most)));
}

function row(label, answer, most) {
  const head = element("th", { scope: "row" }, label);
  if (!answer) return element("tr", { class: "waiting" }, head, element("td", { colspan: 3 }, "…"));
  const { usage, timings_ms: ms } = answer;
  const share = -usage.tokens_saved / usage.text_tokens;
  const saved = share < 0 ? `−${percent(-share)}` : share > 0 ? `+${percent(share)}` : "";
  const width = (part) => (part ?? 0) / most.ms;
  return element(
    "tr",
    {},
    head,
    element("td", { class: "said" }, answer.answer.trim() || "(nothing)"),
    element(
      "td",
      {},
      element("b", {}, number(usage.prompt_tokens)),
      element("span", { class: "quiet" }, ` ${saved}`),
      bar([usage.prompt_tokens / most.tokens, "fill"]),
    ),
    element(
      "td",
      {},
      element("b", {}, time(ms.total)),
      element("span", { class: "quiet" }, ` for ${number(usage.completion_tokens)} written`),
      bar([width(ms.compress), "compress"], [width(ms.first_token), "read"], [width(ms.decode), "write"]),
    ),
  );
}
