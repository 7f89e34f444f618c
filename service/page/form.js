// The form: what is typed and chosen becomes a request, and a problem finds the field it is about.

import { Problem } from "./api.js";
import { exampleRequest } from "./checkpoint.js";
import { $, plural } from "./elements.js";
import { formatPassages, parsePassages } from "./passages.js";
import { MODES } from "./wording.js";

// A field of the API to the element that it is typed into.
const CONTROLS = { query: "query", passages: "passages", rate: "rate", max_prompt_tokens: "budget", max_new_tokens: "tokens" };

/** The request the form asks for. Throws Problem where it cannot be one. */
export function readForm() {
  const passages = parsePassages($("passages").value);
  if (!passages.length) throw new Problem("Give at least one passage.", { field: "passages" });
  const empty = passages.findIndex((passage) => !passage.text);
  if (empty >= 0) throw new Problem(`Passage ${empty + 1} has a title but no text.`, { field: `passages.${empty}.text` });
  return {
    query: $("query").value,
    passages,
    mode: chosenMode(),
    rate: numberIn("rate"),
    max_prompt_tokens: numberIn("budget"),
    max_new_tokens: numberIn("tokens"),
  };
}

/** The number in a field, or null where it is empty. */
const numberIn = (id) => ($(id).value ? Number($(id).value) : null);

const chosenMode = () => new FormData($("form")).get("mode");

export function describeMode() {
  $("mode-hint").textContent = MODES[chosenMode()];
}

export function countPassages() {
  const count = parsePassages($("passages").value).length;
  $("count").textContent = count ? plural(count, "passage") : "";
}

export function loadExample() {
  const { query, passages } = exampleRequest();
  $("query").value = query;
  $("passages").value = formatPassages(passages);
  countPassages();
  $("query").focus();
}

/** Mark the field that `problem` is about, for eyes and for screen readers; null: none is wrong. */
export function markField(problem) {
  for (const id of Object.values(CONTROLS)) {
    $(id).removeAttribute("aria-invalid");
    $(id).removeAttribute("aria-errormessage");
  }
  const wrong = $(CONTROLS[problem?.field?.split(".")[0]]);
  if (!wrong) return;
  wrong.setAttribute("aria-invalid", "true");
  wrong.setAttribute("aria-errormessage", "problem");
  wrong.focus();
}
