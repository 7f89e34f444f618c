// What a prompt costs, by a price that only the reader knows. It is kept in this browser; the service never sees it.

const NAME = "scaledown.price_per_million_prompt_tokens";

/** The price of a million prompt tokens; null where none was given, or the browser keeps nothing. */
export function keptPrice() {
  try {
    return readPrice(localStorage.getItem(NAME) ?? "");
  } catch {
    return null; // storage may be forbidden: the price is then forgotten with the page
  }
}

/** Keep `price`, or forget it where it is null. */
export function keepPrice(price) {
  try {
    if (price === null) localStorage.removeItem(NAME);
    else localStorage.setItem(NAME, String(price));
  } catch {
    // as above
  }
}

/** A price from what was typed or kept; null where it is none. */
export function readPrice(text) {
  const price = Number(text);
  return text.trim() && Number.isFinite(price) && price >= 0 ? price : null;
}

/** The cost of a thousand prompts of `tokens` each, in the price's own currency. */
export function costOfThousand(tokens, price) {
  return (1000 * tokens * price) / 1e6;
}

export const money = (value) => value.toLocaleString("en", { maximumSignificantDigits: 3 });
