// The time between events: how smooth a stream is, beside how soon it begins.

// A stream longer than this keeps its newest gaps; the longest is never forgotten.
const MAX_GAPS = 4096;
const BARS = 48;

export class Gaps {
  #gaps = [];
  #last = null;
  max = 0;
  count = 0;

  // at: milliseconds.
  add(at) {
    if (this.#last !== null) {
      const gap = at - this.#last;
      this.max = Math.max(this.max, gap);
      this.count += 1;
      this.#gaps.push(gap);
      if (this.#gaps.length > 2 * MAX_GAPS) this.#gaps = this.#gaps.slice(-MAX_GAPS);
    }
    this.#last = at;
  }

  // A break in the connection is no gap of the stream's.
  interrupt() {
    this.#last = null;
  }

  // Milliseconds; null while there is no gap.
  median() {
    if (this.#gaps.length === 0) return null;
    const sorted = [...this.#gaps].sort((a, b) => a - b);
    const middle = sorted.length >> 1;
    return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
  }

  // At most BARS heights from 0 to 1, in order; each the longest gap of its part of the stream.
  bars() {
    const parts = Math.min(BARS, this.#gaps.length);
    const bars = new Array(parts).fill(0);
    this.#gaps.forEach((gap, index) => {
      const part = Math.floor((index * parts) / this.#gaps.length);
      bars[part] = Math.max(bars[part], gap);
    });
    const highest = Math.max(...bars, 1);
    return bars.map((gap) => gap / highest);
  }
}

// Milliseconds as people read them.
export function time(ms) {
  if (ms < 1) return "<1 ms";
  if (ms < 10) return `${ms.toFixed(1)} ms`;
  if (ms < 1000) return `${Math.round(ms)} ms`;
  return `${(ms / 1000).toFixed(ms < 10_000 ? 2 : 1)} s`;
}
