// One question, answered as a stream: the answer's words, then what it cost and what became of each passage.

import * as api from "./api.js";
import { noticed } from "./checkpoint.js";
import { $, element, number, percent, time } from "./elements.js";
import { passageItem } from "./passages.js";
import { planOf, verdictOf } from "./wording.js";

/** Ask `body` and show what comes, as it comes; the text of the answer. Throws Problem, or the abort of `signal`. */
export async function answer(body, key, signal) {
  clear();
  const response = await api.post("answer", { ...body, stream: true, explain: true }, key, signal);
  for await (const { name, data } of api.events(response)) {
    if (name === "passages") showPassages(body.passages, data.passages);
    if (name === "token") $("answer").append(data.text);
    if (name === "error") throw api.streamProblem(data);
    if (name === "done") return showDone(data);
  }
  throw new api.Problem("The connection broke before the answer was complete.");
}

function clear() {
  // Beside the form on a wide screen; on a narrow one it is below, out of sight.
  if ($("results").getBoundingClientRect().top > innerHeight / 2) $("results").scrollIntoView();
  $("answer").replaceChildren();
  $("answer").setAttribute("aria-busy", "true");
  for (const id of ["verdict", "facts", "plan", "passages-section"]) $(id).hidden = true;
}

function showPassages(sent, answered) {
  $("passage-list").replaceChildren(...answered.map((passage) => passageItem(sent[passage.index], passage)));
  $("legend").hidden = !answered.some((passage) => passage.evidence);
  $("passages-section").hidden = false;
}

function showDone(data) {
  const { usage, timings_ms: ms, passages, plan } = data;
  const text = data.answer.trim();
  $("answer").replaceChildren(text || element("span", { class: "quiet" }, "The model wrote nothing."));
  const cut = data.finish_reason === "length" ? ", cut off" : "";
  const saved = usage.tokens_saved / usage.text_tokens;
  showFacts({
    "prompt tokens": `${number(usage.prompt_tokens)} of ${number(usage.text_tokens)}`,
    [saved < 0 ? "more than as text" : "saved"]: percent(Math.abs(saved)),
    written: `${number(usage.completion_tokens)}${cut}`,
    time: time(ms.total),
    "to the first token": time(ms.total - (ms.decode ?? 0)),
  });
  const [verdict, tone] = verdictOf(data);
  $("verdict").textContent = verdict;
  $("verdict").className = `verdict ${tone}`;
  $("verdict").hidden = false;
  $("plan").textContent = planOf(plan, passages, time);
  $("plan").hidden = false;
  noticed(data.checkpoint);
  return text;
}

function showFacts(entries) {
  const rows = Object.entries(entries).map(([term, value]) =>
    element("div", {}, element("dt", {}, term), element("dd", {}, value)),
  );
  $("facts").replaceChildren(...rows);
  $("facts").hidden = false;
}
