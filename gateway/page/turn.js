// One turn as this page got it: what came and when, what is missing, and how it ended. Knows neither transport nor screen.

import { Gaps } from "./gaps.js";

export class Turn {
  id = null;
  trace = null;
  // The object of the `open` event.
  open = null;
  lastSeq = -1;
  events = 0;
  heartbeats = 0;
  firstTextMs = null;
  gaps = new Gaps();
  usage = null;
  // What its person is asked and has not answered: the object of a `confirm` event.
  asked = null;
  // All text of all lanes, and of what was asked, in the order it came: what the verdict's digest is of.
  text = "";
  isWhole = true;
  // How it ended: {kind: "done" | "error" | "problem" | "cut" | "left", ...}; null while it goes on.
  end = null;
  // What happened to the connection meanwhile, as sentences.
  troubles = [];

  // request: the turn as sent. seen: told after every change, with the event where it was one.
  constructor(request, transport, seen) {
    this.request = request;
    this.transport = transport;
    this.seen = seen;
    this.sentAt = performance.now();
  }

  named(id, traceparent) {
    this.id ??= id;
    this.trace ??= /^[0-9a-f]{2}-([0-9a-f]{32})-/.exec(traceparent ?? "")?.[1] ?? null;
    this.seen(this);
  }

  // An event that came. One that has been here before (a resumed stream may repeat itself) is passed over.
  take(name, seq, data) {
    if (this.end !== null) return;
    if (Number.isInteger(seq)) {
      if (seq <= this.lastSeq) return;
      if (seq > this.lastSeq + 1 && name !== "gap") this.#miss(this.lastSeq + 1, seq - 1);
      this.lastSeq = seq;
    }
    this.events += 1;
    // The answer to a question is whatever comes next.
    this.asked = name === "confirm" && typeof data.prompt === "string" ? data : null;
    if (this.asked !== null) this.text += data.prompt;
    if (name === "open") {
      this.open = data;
      this.id ??= data.turn_id ?? null;
    } else if (name === "text" && typeof data.text === "string") {
      const now = performance.now();
      this.firstTextMs ??= now - this.sentAt;
      this.gaps.add(now);
      this.text += data.text;
    } else if (name === "usage") {
      this.usage = data;
    } else if (name === "gap") {
      this.#miss(data.from, data.to);
      if (Number.isInteger(data.to)) this.lastSeq = Math.max(this.lastSeq, data.to);
    } else if (name === "done") {
      this.usage = data.usage ?? this.usage;
      this.end = { kind: "done", ...data };
    } else if (name === "error") {
      this.end = { kind: "error", ...data };
    }
    this.seen(this, { name, data });
  }

  #miss(from, to) {
    this.isWhole = false;
    this.gaps.interrupt();
    this.trouble(from === to ? `event ${from} is missing` : `events ${from} to ${to} are missing`);
  }

  heartbeat() {
    this.heartbeats += 1;
    this.seen(this);
  }

  trouble(sentence) {
    this.troubles.push(sentence);
    this.seen(this);
  }

  // The gateway answered with a problem (RFC 9457) instead of a stream.
  refused(problem) {
    this.#finish({ kind: "problem", ...problem });
  }

  // The stream ended without an end and cannot be had back.
  cut(why) {
    this.#finish({ kind: "cut", message: why });
  }

  // We left: there was nothing to stop yet, or nobody to ask.
  left(why) {
    this.#finish({ kind: "left", message: why });
  }

  #finish(end) {
    if (this.end !== null) return;
    this.asked = null;
    this.end = end;
    this.seen(this);
  }
}

// How an end is shown: a word for its badge, the badge's colour, and sentences for what was refused or went wrong.
export function explain(end) {
  if (end.kind === "done") {
    const outcome = end.outcome ?? "done";
    const lines = [];
    if (end.refusal) lines.push(...refusalLines("Policy cut this answer", end.refusal));
    else if (outcome === "blocked") lines.push("Policy cut this answer.");
    if (end.finish === "length") lines.push("It ends here because a length limit was reached.");
    return { word: outcome, tone: outcome, lines, advice: end.refusal ? "The text above had been cleared before the cut." : null };
  }
  if (end.kind === "cut") return { word: "cut off", tone: "failed", lines: [end.message], advice: "What is above may be incomplete, and no verdict was received." };
  if (end.code === "declined" || end.code === "unanswered") {
    const lines = [end.code === "declined" ? "You said no, so the tool was not called." : "Nobody answered in time, so the tool was not called."];
    return { word: end.code, tone: "stopped", lines, advice: null };
  }
  if (end.kind === "left" || end.code === "stopped") {
    return { word: "stopped", tone: "stopped", lines: end.kind === "left" ? [end.message] : [], advice: null };
  }
  const message = end.detail ?? end.message ?? "";
  if (end.code === "policy_denied") {
    const lines = end.policy ? refusalLines("Policy refused this prompt", end.policy) : [`Policy refused this prompt${message ? `: ${message}` : ""}.`];
    return { word: "blocked", tone: "blocked", lines, advice: "The model never saw it." };
  }
  const code = end.code ?? `HTTP ${end.status}`;
  return { word: "failed", tone: "failed", lines: [message ? `${code}: ${message}` : code], advice: retryAdvice(end) };
}

function refusalLines(lead, { rule, categories }) {
  const about = (categories ?? []).map((category) => category.replaceAll("_", " ")).join(", ");
  return [`${lead}${rule ? `, by rule ${rule}` : ""}${about ? ` (${about})` : ""}.`];
}

function retryAdvice({ code, retryable, retry_after_ms: wait }) {
  if (code === "unauthenticated" || code === "token_expired") {
    return "Open the link that headgate dev printed, or put a token under Connection.";
  }
  if (!retryable) return "The same request will fail again.";
  if (wait > 0) return `The same request may work in ${wait < 1000 ? `${wait} ms` : `${Math.ceil(wait / 1000)} s`}.`;
  return "The same request may work now.";
}
