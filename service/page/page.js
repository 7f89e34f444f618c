// The page's wiring: form to request, events to elements. What anyone typed only ever becomes text.

import * as api from "./api.js";
import { compare } from "./comparison.js";
import { element, number, percent, time } from "./elements.js";
import { formatPassages, parsePassages, passageItem } from "./passages.js";

const $ = (id) => document.getElementById(id);
const form = $("form");
let example = null;
let checkpoint = null;
let running = null; // the AbortController of what runs now

form.addEventListener("submit", (event) => {
  event.preventDefault();
  run(answer);
});
$("compare").addEventListener("click", () => {
  if (form.reportValidity()) run(compareModes);
});
$("stop").addEventListener("click", () => running?.abort());
$("example").addEventListener("click", loadExample);
$("passages").addEventListener("input", countPassages);
form.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});
showState();

/** Run one job at a time: a new one stops the last. Problems are shown in words. */
async function run(job) {
  running?.abort();
  const mine = (running = new AbortController());
  $("problem").hidden = true;
  $("stop").hidden = false;
  try {
    await job(request(), mine.signal);
  } catch (error) {
    if (mine === running) fail(error);
  } finally {
    if (mine === running) {
      if (document.activeElement === $("stop")) $("query").focus(); // focus must not go with the button
      $("stop").hidden = true;
      $("answer").setAttribute("aria-busy", "false");
      running = null;
    }
  }
}

function fail(error) {
  if (error.name === "AbortError") {
    announce("Stopped.");
    return;
  }
  const known = error instanceof api.Problem;
  if (!known) console.error(error);
  $("problem").textContent = known ? error.message : "The answer broke off. Try again.";
  $("problem").hidden = false;
  announce("");
  if (!$("answer").textContent) $("answer").append(element("span", { class: "quiet" }, "No answer."));
  if (error.status === 401 || error.status === 403) {
    $("key-field").hidden = false;
    $("key").focus();
  }
  if (error.status === 422) showState(); // the checkpoint may have been changed for one with other rates
}

/** The request the form asks for. Throws Problem where it cannot be one. */
function request() {
  const passages = parsePassages($("passages").value);
  if (!passages.length) throw new api.Problem("Give at least one passage.");
  const empty = passages.findIndex((passage) => !passage.text);
  if (empty >= 0) throw new api.Problem(`Passage ${empty + 1} has a title but no text.`);
  return {
    query: $("query").value,
    passages,
    rate: $("rate").value ? Number($("rate").value) : null,
    max_new_tokens: Number($("tokens").value),
  };
}

async function answer(body, signal) {
  clearAnswer();
  announce("Answering …");
  const mode = new FormData(form).get("mode");
  const response = await api.post("answer", { ...body, mode, stream: true, explain: true }, $("key").value, signal);
  for await (const { name, data } of api.events(response)) {
    if (name === "passages") showPassages(body.passages, data.passages);
    if (name === "token") $("answer").append(data.text);
    if (name === "error") throw new api.Problem(api.said(data.error) ?? "The service failed.");
    if (name === "done") {
      showDone(data);
      return;
    }
  }
  throw new api.Problem("The connection broke before the answer was complete.");
}

function clearAnswer() {
  // Beside the form on a wide screen; on a narrow one it is below, out of sight.
  if ($("results").getBoundingClientRect().top > innerHeight / 2) $("results").scrollIntoView();
  $("answer").replaceChildren();
  $("answer").setAttribute("aria-busy", "true");
  for (const id of ["verdict", "facts", "passages-section"]) $(id).hidden = true;
}

function showPassages(sent, answered) {
  $("passage-list").replaceChildren(...answered.map((passage) => passageItem(sent[passage.index], passage)));
  $("legend").hidden = !answered.some((passage) => passage.evidence);
  $("passages-section").hidden = false;
}

function showDone(data) {
  const { usage, timings_ms: ms, answerable } = data;
  const text = data.answer.trim();
  $("answer").replaceChildren(text || element("span", { class: "quiet" }, "The model wrote nothing."));
  const cut = data.finish_reason === "length" ? ", cut off" : "";
  const saved = usage.tokens_saved / usage.text_tokens;
  facts({
    "prompt tokens": `${number(usage.prompt_tokens)} of ${number(usage.text_tokens)}`,
    [saved < 0 ? "more than as text" : "saved"]: percent(Math.abs(saved)),
    written: `${number(usage.completion_tokens)}${cut}`,
    time: time(ms.total),
    "to the first token": time(ms.total - (ms.decode ?? 0)),
  });
  if (answerable) {
    const verdict = answerable.answerable ? "The passages seem to hold an answer" : "The passages may not hold an answer";
    $("verdict").textContent = `${verdict} (${answerable.probability.toFixed(2)}).`;
    $("verdict").classList.toggle("doubtful", !answerable.answerable);
    $("verdict").hidden = false;
  }
  announce(`The answer is complete. ${text}`);
  if (data.checkpoint !== checkpoint) showState(); // it was changed while the page was open
}

function facts(entries) {
  const rows = Object.entries(entries).map(([term, value]) =>
    element("div", {}, element("dt", {}, term), element("dd", {}, value)),
  );
  $("facts").replaceChildren(...rows);
  $("facts").hidden = false;
}

async function compareModes(body, signal) {
  announce("Asking the same question three ways …");
  $("comparison").hidden = false;
  $("comparison").scrollIntoView({ block: "nearest" });
  await compare($("comparison-rows"), body, $("key").value, signal);
  announce("The comparison is complete.");
}

async function showState() {
  try {
    const state = await api.state();
    ({ example, checkpoint } = state);
    $("example").disabled = false;
    const trained = state.trained ? "trained" : "untrained: compressed answers cannot make sense yet";
    $("checkpoint").textContent = checkpoint ? `checkpoint ${checkpoint} · ${trained}` : "The model is still being loaded.";
    $("checkpoint").classList.toggle("untrained", checkpoint !== null && !state.trained);
    $("key-field").hidden &&= !state.key_needed;
    $("tokens").max = state.max_new_tokens;
    const chosen = $("rate").value;
    const options = state.rates.map((rate) => element("option", { value: rate }, `${rate} : 1`));
    if (options.length) $("rate").replaceChildren(...options);
    if (state.rates.includes(Number(chosen))) $("rate").value = chosen;
    if (!checkpoint) setTimeout(showState, 2000);
  } catch (error) {
    $("checkpoint").textContent = error.message;
    setTimeout(showState, 5000);
  }
}

function loadExample() {
  $("query").value = example.query;
  $("passages").value = formatPassages(example.passages);
  countPassages();
  $("query").focus();
}

function countPassages() {
  const count = parsePassages($("passages").value).length;
  $("count").textContent = count ? `${count} ${count === 1 ? "passage" : "passages"}` : "";
}

/** For screen readers: said once, when it is worth saying, not at every token. */
function announce(words) {
  $("status").textContent = words;
}
