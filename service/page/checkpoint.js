// The checkpoint that serves now: its name in the header, and what of it bounds the form.

import * as api from "./api.js";
import { $, element } from "./elements.js";

let current = null;
let example = null;
let timer = 0;

/** A question with passages for “Load an example”; null until the service has said one. */
export const exampleRequest = () => example;

/** Look again where `name`, met in an answer or in the metrics, is not the checkpoint that is shown. */
export function noticed(name) {
  if (name && name !== current) showCheckpoint();
}

/** Ask the service, and go on asking until a checkpoint serves. */
export async function showCheckpoint() {
  clearTimeout(timer);
  try {
    const state = await api.state();
    ({ example, checkpoint: current } = state);
    $("example").disabled = false;
    const trained = state.trained ? "trained" : "untrained: compressed answers cannot make sense yet";
    const name = `checkpoint ${current} · ${state.readout} readout · ${trained}`;
    $("checkpoint").textContent = current ? name : "The model is still being loaded.";
    $("checkpoint").classList.toggle("untrained", current !== null && !state.trained);
    $("key-field").hidden &&= !state.key_needed;
    $("tokens").max = state.max_new_tokens;
    offerRates(state.rates);
    if (!current) timer = setTimeout(showCheckpoint, 2000);
  } catch (error) {
    $("checkpoint").textContent = error.message;
    timer = setTimeout(showCheckpoint, 5000);
  }
}

function offerRates(rates) {
  const chosen = $("rate").value;
  if (rates.length) $("rate").replaceChildren(...rates.map((rate) => element("option", { value: rate }, `${rate} : 1`)));
  if (rates.includes(Number(chosen))) $("rate").value = chosen;
}
