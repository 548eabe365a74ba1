// Carries a turn over server-sent events or a WebSocket, and comes back for the rest of it when the connection breaks.

import { readEvents } from "./sse.js";

const PATH = "/v1/chat/stream";
const SUBPROTOCOL = "headgate.v1";
// How long to wait before each attempt to come back, in milliseconds.
const PAUSES = [250, 500, 1000, 2000, 4000];

const GONE = "The stream was cut and the gateway no longer has the turn: its route ends a turn whose client leaves.";

// Why an answer to a question is not taken.
const UNTAKEN = ["not_found", "already_answered"];

// What one attempt to follow a stream came to, where the turn itself has no end yet.
const BROKEN = "broken";
const LOST = "lost";

// A turn over server-sent events.
export class SseTransport {
  name = "SSE";

  // Follows the turn to its end. quit: an AbortSignal by which the caller leaves.
  async run(turn, token, quit) {
    const headers = { "content-type": "application/json", accept: "text/event-stream", ...bearer(token) };
    let outcome = await this.#follow(turn, quit, PATH, { method: "POST", headers, body: JSON.stringify(turn.request) }, true);
    await comeBack(turn, quit, outcome, () => {
      const last = turn.lastSeq < 0 ? {} : { "last-event-id": `${turn.id}:${turn.lastSeq}` };
      const headers = { accept: "text/event-stream", ...last, ...bearer(token) };
      return this.#follow(turn, quit, `${PATH}/${encodeURIComponent(turn.id)}`, { headers }, false);
    });
  }

  async #follow(turn, quit, url, request, isFirst) {
    let response;
    try {
      response = await fetch(url, { ...request, signal: quit, cache: "no-store", credentials: "omit", redirect: "error" });
    } catch {
      if (isFirst && !quit.aborted) turn.cut("The gateway cannot be reached.");
      return BROKEN;
    }
    turn.named(response.headers.get("x-headgate-turn"), response.headers.get("traceparent"));
    if (!response.ok) {
      const problem = await readProblem(response);
      if (isFirst) turn.refused(problem);
      else if (problem.code === "session_not_found") return LOST;
      else if (!problem.retryable) turn.cut(`The stream was cut, and the gateway did not give the rest: ${problem.code ?? problem.status}.`);
      return BROKEN;
    }
    try {
      await readEvents(response.body, (event) => heard(turn, event), () => turn.heartbeat());
    } catch {
      // The connection broke: whether that matters depends on whether the turn had ended.
    }
    return BROKEN;
  }

  // Whether the gateway could be asked to stop the turn.
  async stop(turn, token) {
    if (turn.id === null) return false;
    try {
      const response = await fetch(`${PATH}/${encodeURIComponent(turn.id)}/stop`, { method: "POST", headers: bearer(token), credentials: "omit" });
      return response.ok;
    } catch {
      return false;
    }
  }

  // Says yes or no to a question; why that was not taken, or null.
  async confirm(turn, token, id, accept) {
    try {
      const headers = { "content-type": "application/json", ...bearer(token) };
      const url = `${PATH}/${encodeURIComponent(turn.id)}/confirm`;
      const response = await fetch(url, { method: "POST", headers, body: JSON.stringify({ id, accept }), credentials: "omit" });
      return response.ok ? null : ((await readProblem(response)).code ?? `HTTP ${response.status}`);
    } catch {
      return "the gateway cannot be reached";
    }
  }

  close() {}
}

// Turns over one WebSocket, which stays open between them.
export class SocketTransport {
  name = "WebSocket";
  #socket = null;
  #token = null;
  #ref = 0;

  async run(turn, token, quit) {
    if (this.#token !== token) this.close();
    const ref = this.#nameOf(++this.#ref);
    let outcome = await this.#follow(turn, token, quit, { type: "turn", ref, ...turn.request }, ref);
    await comeBack(turn, quit, outcome, () => {
      const after = turn.lastSeq < 0 ? {} : { after: turn.lastSeq };
      return this.#follow(turn, token, quit, { type: "resume", turn_id: turn.id, ...after }, null);
    });
  }

  async #follow(turn, token, quit, frame, ref) {
    const socket = await this.#open(token, quit);
    if (socket === null) {
      // A browser is not told why a handshake failed.
      if (ref !== null && !quit.aborted) turn.cut("The WebSocket could not be opened. Over SSE the gateway can say why.");
      return BROKEN;
    }
    return new Promise((resolve) => {
      const finish = (outcome) => {
        socket.onmessage = socket.onclose = null;
        quit.removeEventListener("abort", leave);
        resolve(outcome);
      };
      const leave = () => {
        this.close();
        finish(BROKEN);
      };
      quit.addEventListener("abort", leave);
      socket.onclose = ({ code, reason }) => {
        this.#socket = null;
        if (turn.id === null) turn.cut(`The gateway closed the WebSocket: ${code}${reason ? ` ${reason}` : ""}.`);
        finish(BROKEN);
      };
      socket.onmessage = ({ data }) => {
        const { type, turn_id, seq, ref: theirs, ...object } = parse(data);
        const isOurs = turn.id === null ? theirs === ref || (theirs === undefined && type === "error") : turn_id === turn.id;
        if (!isOurs) return;
        // An error without a number is not of the stream: coming back for it failed.
        if (ref === null && type === "error" && seq === undefined) {
          if (object.code === "session_not_found") return finish(LOST);
          if (!object.retryable) turn.cut(`The stream was cut, and the gateway did not give the rest: ${object.code}.`);
          return finish(BROKEN);
        }
        // Nor is what became of an answer to a question.
        if (type === "error" && seq === undefined && UNTAKEN.includes(object.code)) return turn.trouble(`the answer was not taken: ${object.code}`);
        turn.take(type, seq, turn_id === undefined ? object : { turn_id, ...object });
        if (turn.end !== null) finish(BROKEN);
      };
      socket.send(JSON.stringify(frame));
    });
  }

  async #open(token, quit) {
    if (this.#socket?.readyState === WebSocket.OPEN) return this.#socket;
    // A subprotocol takes only the characters of an HTTP token; any other credential goes in the first frame.
    const fits = token !== "" && /^[!#$%&'*+\-.^_`|~0-9A-Za-z]+$/.test(token);
    const url = new URL(PATH, location.href);
    url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
    url.hash = "";
    const socket = new WebSocket(url, fits ? [SUBPROTOCOL, `bearer.${token}`] : [SUBPROTOCOL]);
    const opened = await new Promise((resolve) => {
      socket.onopen = () => resolve(true);
      socket.onclose = () => resolve(false);
      quit.addEventListener("abort", () => resolve(false), { once: true });
    });
    if (!opened) {
      socket.close();
      return null;
    }
    socket.onclose = () => (this.#socket = null);
    if (token !== "" && !fits) socket.send(JSON.stringify({ type: "auth", token }));
    this.#socket = socket;
    this.#token = token;
    return socket;
  }

  // Before its first event a turn has no name but ours.
  async stop(turn) {
    if (this.#socket?.readyState !== WebSocket.OPEN) return false;
    const which = turn.id === null ? { ref: this.#nameOf(this.#ref) } : { turn_id: turn.id };
    this.#socket.send(JSON.stringify({ type: "stop", ...which }));
    return true;
  }

  async confirm(turn, token, id, accept) {
    if (this.#socket?.readyState !== WebSocket.OPEN) return "the connection is gone";
    this.#socket.send(JSON.stringify({ type: "confirm", turn_id: turn.id, id, accept }));
    return null;
  }

  #nameOf(number) {
    return `turn-${number}`;
  }

  close() {
    this.#socket?.close(1000);
    this.#socket = null;
  }
}

// Tries again until the turn has its end, or there is nothing left to come back to.
async function comeBack(turn, quit, outcome, again) {
  for (const pause of PAUSES) {
    if (turn.end !== null || quit.aborted || outcome === LOST) break;
    if (turn.id === null) return turn.cut("The connection broke before the turn had a number to come back to.");
    turn.gaps.interrupt();
    const before = turn.events;
    turn.trouble(turn.lastSeq < 0 ? "the stream was cut before its first event; coming back" : `the stream was cut after event ${turn.lastSeq}; coming back`);
    await sleep(pause, quit);
    if (quit.aborted) break;
    outcome = await again();
    if (turn.events > before) turn.trouble(`came back: ${turn.events - before} more events`);
  }
  // Of several reasons the first stands.
  if (quit.aborted) turn.left("This page left the turn.");
  turn.cut(outcome === LOST ? GONE : `The stream was cut, and ${PAUSES.length} attempts to come back failed.`);
}

function heard(turn, { name, id, data }) {
  const seq = /:(\d+)$/.exec(id)?.[1];
  turn.take(name, seq === undefined ? undefined : Number(seq), parse(data));
}

function parse(json) {
  try {
    const value = JSON.parse(json);
    return value !== null && typeof value === "object" ? value : {};
  } catch {
    return {};
  }
}

async function readProblem(response) {
  const problem = parse(await response.text().catch(() => ""));
  const seconds = Number(response.headers.get("retry-after"));
  const wait = seconds > 0 ? { retry_after_ms: seconds * 1000 } : {};
  return { status: response.status, retryable: response.status >= 500, ...wait, ...problem };
}

function bearer(token) {
  return token === "" ? {} : { authorization: `Bearer ${token}` };
}

function sleep(ms, quit) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, ms);
    quit.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true });
  });
}
