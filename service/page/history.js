// A bounded history of the service's metrics, read while the page can be seen. Draws nothing.

import * as api from "./api.js";
import { increase, parse, quantile, total } from "./prometheus.js";

const EVERY_MS = 5000;
const AGAIN_MS = 30000; // after a reading failed
const KEPT = 120; // readings: ten minutes of them
// What looks after the service and this page, not what it is asked for.
const OWN_ROUTES = /^(\/|\/page\/.*|\/docs|\/openapi\.json|\/livez|\/readyz|\/health|\/metrics|other)$/;

/** Values between two readings, `seconds` apart. null: nothing happened that has a value. */
export function measure(before, now, seconds) {
  const grown = (name, keep) => increase(before, now, name, keep);
  const text = grown("scaledown_text_tokens_total");
  return {
    requests: grown("scaledown_requests_total", ({ route }) => !OWN_ROUTES.test(route)) / seconds,
    errors: grown("scaledown_errors_total") / seconds,
    saved: text ? grown("scaledown_tokens_saved_total") / text : null,
    firstToken: quantile(before, now, "scaledown_time_to_first_token_seconds", 0.5),
    inFlight: total(now, "scaledown_requests_in_flight"),
    reserved: total(now, "scaledown_reserved_tokens"),
  };
}

/**
 * Read /metrics again and again. `onReading(points, checkpoint)`: all points kept, `{at, values}` with `at` in
 * milliseconds, oldest first, and the name of what serves; `onProblem(words)` where there is nothing to read.
 */
export function followMetrics(onReading, onProblem) {
  const points = [];
  let last = null;
  let timer = 0;
  let reading = false;

  async function read() {
    clearTimeout(timer);
    if (reading || document.hidden) return;
    reading = true;
    let wait = EVERY_MS;
    try {
      const series = parse(await api.metrics(AbortSignal.timeout(2 * EVERY_MS)));
      if (!series.size) throw new api.Problem("", { status: 200 }); // some proxy's own page
      add({ series, at: performance.now() });
      onReading(points, serving(series));
    } catch (error) {
      wait = AGAIN_MS;
      onProblem(error.status ? `The service does not show its metrics here (status ${error.status}).` : error.message);
    } finally {
      reading = false;
      if (!document.hidden) timer = setTimeout(read, wait);
    }
  }

  function add(now) {
    if (last) points.push({ at: now.at, values: measure(last.series, now.series, (now.at - last.at) / 1000) });
    points.splice(0, points.length - KEPT);
    last = now;
  }

  document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(timer) : read()));
  read();
}

function serving(series) {
  const info = [...series.values()].find(({ name, value }) => name === "scaledown_checkpoint_info" && value === 1);
  return info?.labels.checkpoint;
}
