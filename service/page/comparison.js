// The same question in the three modes, one after the other: answers, tokens, time and cost side by side.

import { post } from "./api.js";
import { $, bar, element, number, percent, plural, time } from "./elements.js";
import { costOfThousand, keepPrice, keptPrice, money, readPrice } from "./price.js";

const MODES = ["text", "hybrid", "compressed"];
let results = new Map(); // responses by mode, of the question compared last
let price = keptPrice();

$("price").value = price ?? "";
$("price").addEventListener("input", () => {
  price = readPrice($("price").value);
  keepPrice(price);
  if (results.size) draw();
});

/** Ask in each mode and show each answer as it is there. `body` is a request. Throws what `post` throws. */
export async function compare(body, key, signal) {
  results = new Map();
  draw();
  $("comparison").hidden = false;
  $("comparison").scrollIntoView({ block: "nearest" });
  for (const mode of MODES) {
    // Under a budget, each mode would drop other passages: all three read the same ones.
    const response = await post("answer", { ...body, mode, max_prompt_tokens: null }, key, signal);
    results.set(mode, await response.json());
    draw();
  }
}

function draw() {
  const answers = [...results.values()];
  const most = {
    tokens: Math.max(...answers.map((answer) => answer.usage.text_tokens), 1),
    ms: Math.max(...answers.map((answer) => answer.timings_ms.total), 1),
  };
  $("comparison-rows").replaceChildren(
    row("Answer", ({ answer }) => [element("span", { class: "said" }, answer.trim() || "(nothing)")]),
    row("Prompt tokens", ({ usage }) => tokens(usage, most.tokens)),
    row("Time", (answer) => duration(answer, most.ms)),
    row("Cost of 1,000 such prompts", ({ usage }) => cost(usage)),
  );
  $("cached").hidden = !answers.some(({ usage }) => usage.cached_chunks);
}

/** One row of the table: `cell` makes the contents for each mode that has answered. */
function row(head, cell) {
  const cells = MODES.map((mode) => {
    const answer = results.get(mode);
    return element("td", { class: answer ? null : "quiet" }, ...(answer ? cell(answer) : ["…"]));
  });
  return element("tr", {}, element("th", { scope: "row" }, head), ...cells);
}

function tokens(usage, most) {
  return [element("b", {}, number(usage.prompt_tokens)), difference(usage), bar([usage.prompt_tokens / most, "fill"])];
}

/** How far the prompt is from one with all passages as text. */
function difference({ tokens_saved: saved, text_tokens: text }) {
  const sign = saved > 0 ? "−" : "+";
  return saved ? element("span", { class: "quiet" }, ` ${sign}${percent(Math.abs(saved) / text)}`) : null;
}

function duration({ usage, timings_ms: ms }, most) {
  const width = (part) => (part ?? 0) / most;
  const cached = usage.cached_chunks ? `, ${plural(usage.cached_chunks, "chunk")} cached` : "";
  return [
    element("b", {}, time(ms.total)),
    element("span", { class: "quiet" }, ` for ${number(usage.completion_tokens)} written${cached}`),
    bar([width(ms.compress), "compress"], [width(ms.first_token), "read"], [width(ms.decode), "write"]),
  ];
}

function cost(usage) {
  if (price === null) return [element("span", { class: "quiet" }, "no price given")];
  return [element("b", {}, money(costOfThousand(usage.prompt_tokens, price)))];
}
