// How the API's names for modes and reasons are said to a reader. A name that is new here is shown as it is.

export const MODES = {
  compressed: "Every passage as embeddings.",
  hybrid: "Every passage as embeddings, and the most relevant as text too.",
  text: "Every passage as text, for comparison.",
  auto: "Each in the form that costs less, by costs measured at the start; usually only very short ones stay text.",
};

const SHOWN = { text: "Shown as text", compressed: "Compressed", hybrid: "Embeddings and text", dropped: "Dropped" };

const REASONS = {
  asked: "the mode asks for it",
  most_relevant: "it is among the most relevant",
  relevant: "it is relevant enough, and its text fits",
  pays: "that costs less than its text",
  no_gain: "compressing it would not pay",
  no_text: "only its embeddings are known",
  over_budget: "it does not fit the prompt budget",
  below_min_relevance: "it is less relevant than asked for",
};

const PLANS = {
  asked: "The mode decided",
  costs: "Measured costs per token decided",
  relevance: "Relevance decided: not everything fits as text, so every passage was scored",
};

/** How a passage was shown and why, in two parts: the state, and the rest of the sentence. */
export function stateOf({ mode, reason, tokens }) {
  const text = mode === "compressed" && reason === "over_budget";
  const why = text ? "its text does not fit the prompt budget" : (REASONS[reason] ?? reason);
  const size = mode === "dropped" ? "" : ` (${tokens} tokens)`;
  return [SHOWN[mode] ?? mode, `${size} because ${why}.`];
}

/** What became of the passages together, and what decided it. */
export function planOf({ reason, rate, estimates_ms: estimates }, passages, time) {
  const kinds = { text: "as text", compressed: `compressed (rate ${rate})`, hybrid: "as both", dropped: "dropped" };
  const counted = Object.entries(kinds).map(([mode, words]) => [passages.filter((p) => p.mode === mode).length, words]);
  const sizes = counted.filter(([count]) => count).map((each) => each.join(" ")).join(", ");
  const sentences = [`${sizes}.`, `${PLANS[reason] ?? reason}.`];
  if (estimates) {
    const { text, compressed, hybrid } = estimates;
    sentences.push(
      `Estimated up to the first token: ${time(text)} all as text, ${time(compressed)} all compressed,` +
        ` ${time(hybrid)} with each passage in its cheaper form.`,
    );
  }
  return sentences.join(" ");
}

/** Whether the passages hold an answer, as far as that is known: the words, and the class that colours them. */
export function verdictOf({ answerable, passages, plan }) {
  if (plan.mode === null) return ["All passages were dropped: this answer comes from none of them.", "doubtful"];
  if (answerable) {
    const { answerable: held, probability } = answerable;
    const words = held ? "The passages seem to hold an answer" : "The passages may not hold an answer";
    return [`${words} (${probability.toFixed(2)}).`, held ? "" : "doubtful"];
  }
  const unscored = passages.some((passage) => passage.relevance === null);
  const why = unscored ? "not every passage was scored" : "this checkpoint has no calibrated threshold";
  return [`Whether the passages hold an answer is not known: ${why}.`, "quiet"];
}
