// The text of /metrics in Prometheus' exposition format, and what two readings of it say. Knows no metric by name.

const LINE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+([^\s]+)/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;
const ESCAPED = { "\\n": "\n", '\\"': '"', "\\\\": "\\" };

/** `text` as a Map from each series, as it is written, to `{name, labels, value}`. Comments and the unreadable are left out. */
export function parse(text) {
  const series = new Map();
  for (const line of text.split("\n")) {
    const [, name, written = "", value] = LINE.exec(line) ?? [];
    const read = number(value);
    if (Number.isNaN(read)) continue;
    const pairs = [...written.matchAll(LABEL)].map(([, label, raw]) => [label, raw.replace(/\\[n"\\]/g, (e) => ESCAPED[e])]);
    series.set(`${name}{${written}}`, { name, labels: Object.fromEntries(pairs), value: read });
  }
  return series;
}

const number = (value) => (/^[+-]?Inf$/.test(value) ? Number(value.replace("Inf", "Infinity")) : Number(value));

/** The sum of all series of `name`: of a gauge with labels, its total. */
export function total(series, name) {
  return named(series, name).reduce((sum, [, { value }]) => sum + value, 0);
}

/** How much the counters of `name` that `keep` accepts have grown. One that is smaller than before began anew at 0. */
export function increase(before, now, name, keep = () => true) {
  let sum = 0;
  for (const [key, { labels, value }] of named(now, name)) {
    const last = before.get(key)?.value ?? 0;
    if (keep(labels)) sum += value < last ? value : value - last;
  }
  return sum;
}

/** The `q`-quantile of what a histogram saw between two readings, interpolated within its bucket; null: it saw nothing. */
export function quantile(before, now, name, q) {
  const bounds = new Map(); // of each bucket, how many values were at most its bound
  for (const [, { labels }] of named(now, `${name}_bucket`)) {
    const { le } = labels;
    if (!bounds.has(le)) bounds.set(le, increase(before, now, `${name}_bucket`, (each) => each.le === le));
  }
  const buckets = [...bounds].map(([le, count]) => [number(le), count]).sort(([a], [b]) => a - b);
  const rank = q * (buckets.at(-1)?.[1] ?? 0);
  if (!rank) return null;
  const i = buckets.findIndex(([, count]) => count >= rank);
  const [low, below] = buckets[i - 1] ?? [0, 0];
  const [high, count] = buckets[i];
  return high === Infinity ? low : low + ((high - low) * (rank - below)) / (count - below);
}

const named = (series, name) => [...series].filter(([, each]) => each.name === name);
