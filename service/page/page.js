// The page's wiring: what is clicked starts a job, one at a time; what goes wrong is shown in words.

import { answer } from "./answer.js";
import { Problem } from "./api.js";
import { chartsProblem, drawCharts } from "./charts.js";
import { noticed, showCheckpoint } from "./checkpoint.js";
import { compare } from "./comparison.js";
import { $, element } from "./elements.js";
import { countPassages, describeMode, loadExample, markField, readForm } from "./form.js";
import { followMetrics } from "./history.js";

const form = $("form");
let running = null; // the AbortController of what runs now

form.addEventListener("submit", (event) => {
  event.preventDefault();
  run(answerOnce);
});
$("compare").addEventListener("click", () => {
  if (form.reportValidity()) run(compareModes);
});
$("stop").addEventListener("click", () => running?.abort());
$("example").addEventListener("click", loadExample);
$("passages").addEventListener("input", countPassages);
form.addEventListener("change", describeMode);
form.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});
describeMode(); // a browser may have kept another choice over a reload
countPassages();
showCheckpoint();
followMetrics((points, checkpoint) => {
  drawCharts(points);
  noticed(checkpoint);
}, chartsProblem);

/** Run one job at a time: a new one stops the last. */
async function run(job) {
  running?.abort();
  const mine = (running = new AbortController());
  $("problem").hidden = true;
  markField(null);
  $("stop").hidden = false;
  try {
    await job(readForm(), $("key").value, mine.signal);
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

async function answerOnce(body, key, signal) {
  announce("Answering …");
  announce(`The answer is complete. ${await answer(body, key, signal)}`);
}

async function compareModes(body, key, signal) {
  announce("Asking the same question three ways …");
  await compare(body, key, signal);
  announce("The comparison is complete.");
}

function fail(error) {
  if (error.name === "AbortError") {
    announce("Stopped.");
    return;
  }
  const known = error instanceof Problem;
  if (!known) console.error(error);
  $("problem-words").textContent = known ? error.message : "The answer broke off. Try again.";
  const where = [error.field && `field ${error.field}`, error.id && `request ${error.id}`].filter(Boolean);
  $("problem-where").textContent = where.join(" · ");
  $("problem").hidden = false;
  announce("");
  if (!$("answer").textContent) $("answer").append(element("span", { class: "quiet" }, "No answer."));
  if (error.status === 401 || error.status === 403) {
    $("key-field").hidden = false;
    $("key").focus();
  }
  markField(error);
  if (error.status === 422) showCheckpoint(); // it may have been changed for one with other rates
}

/** For screen readers: said once, when it is worth saying, not at every token. */
function announce(words) {
  $("status").textContent = words;
}
