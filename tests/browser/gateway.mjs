// A gateway that plays scripts: the page's files, the calls of docs/wire.md, verdicts with real signatures, and the
// breakdowns that a healthy gateway does not offer: cuts, gaps, forged verdicts, hostile text.

import { createHash, generateKeyPairSync, randomUUID, sign } from "node:crypto";
import { readFileSync } from "node:fs";
import { createServer } from "node:http";
import { extname } from "node:path";
import { WebSocketServer } from "ws";

const PAGE = new URL("../../gateway/page/", import.meta.url);
const KINDS = { ".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml" };
const PATH = "/v1/chat/stream";

// The page's own policy, so that what it forbids is forbidden here too.
const POLICY = /const CONTENT_SECURITY_POLICY: &str = "((?:[^"\\]|\\\n\s*)*)";/
  .exec(readFileSync(new URL("../../gateway/src/page.rs", import.meta.url), "utf8"))[1]
  .replace(/\\\n\s*/g, "");

export const TOKEN = "key-of-the-test";
export const CONSTITUTION = `sha-256=:${createHash("sha256").update("constitution").digest("base64")}:`;

const base64url = (object) => Buffer.from(JSON.stringify(object)).toString("base64url");

// One turn: what it has said so far, to whom it speaks, and how it is stopped.
class Turn {
  id = randomUUID();
  events = [];
  text = "";
  trace = randomUUID().replaceAll("-", "");
  over = false;
  #next = 0;
  #wake = new Set();

  constructor(gateway, request) {
    this.gateway = gateway;
    this.request = request;
    this.stopped = new Promise((resolve) => (this.stop = resolve));
    // What a script waits for, so that a test says when it goes on.
    this.cued = new Promise((resolve) => (this.cue = resolve));
  }

  say(name, data) {
    if (this.over) return;
    if (name === "text") this.text += data.text;
    if (name === "confirm") this.text += data.prompt;
    // A gap is numbered as the last event it stands for.
    const seq = name === "gap" ? data.to : this.#next;
    this.#next = seq + 1;
    this.events.push({ seq, name, data });
    if (name === "done" || name === "error") this.over = true;
    this.#wakeAll();
  }

  // Asks, and waits for the answer.
  ask(id, prompt, tool) {
    const answered = new Promise((resolve) => (this.asked = { id, resolve }));
    this.say("confirm", { id, prompt, tool });
    return answered;
  }

  // The status and code of an answer; the first one counts.
  confirm({ id, accept }) {
    if (this.asked?.id !== id) return [404, "not_found"];
    if (this.asked.resolve === null) return [409, "already_answered"];
    this.asked.resolve(accept);
    this.asked.resolve = null;
    return [202];
  }

  // Breaks the connections that carry it; the turn itself goes on.
  cut() {
    for (const reader of [...this.#wake]) reader("cut");
  }

  #wakeAll() {
    for (const reader of [...this.#wake]) reader();
  }

  open() {
    const { session_id: session = randomUUID(), model = "scripted" } = this.request;
    this.session = session;
    this.say("open", { turn_id: this.id, session_id: session, model, policy_version: "2026-11-21", constitution_hash: CONSTITUTION });
  }

  done(outcome = "allowed", more = {}, claims = {}) {
    const usage = { input_tokens: 7, output_tokens: this.events.filter(({ name }) => name === "text").length };
    const finish = more.refusal ? "content_filter" : "stop";
    this.say("done", { finish, outcome, usage, ...more, verdict: this.verdict(outcome, claims) });
  }

  verdict(outcome, claims) {
    const now = Math.floor(Date.now() / 1000);
    const { kid, privateKey } = this.gateway.key;
    const payload = {
      iss: "headgate-dev", aud: "audit", iat: now, exp: now + 60, jti: randomUUID().replaceAll("-", "").slice(0, 22), tid: "default", sub: "dev",
      sid: this.session, turn: this.id, dir: "output", bdg: `sha-256=:${createHash("sha256").update(this.text).digest("base64")}:`,
      dec: { allowed: "allow", masked: "redact", flagged: "flag", blocked: "deny" }[outcome], cat: outcome === "masked" ? ["pii"] : [],
      pol: { id: "default", ver: "2026-11-21" }, con: CONSTITUTION, mode: "enforce", trc: this.trace, ...claims,
    };
    const signed = `${base64url({ alg: "Ed25519", typ: "policy-verdict+jwt", kid })}.${base64url(payload)}`;
    return `${signed}.${sign(null, Buffer.from(signed), privateKey).toString("base64url")}`;
  }

  // Gives every event after number `after` to `write`; ends with "over" or "cut".
  read(after, write) {
    return new Promise((resolve) => {
      let at = this.events.findIndex(({ seq }) => seq > after);
      if (at < 0) at = this.events.length;
      const reader = (word) => {
        if (word === "cut") return (this.#wake.delete(reader), resolve("cut"));
        for (; at < this.events.length; at++) write(this.events[at]);
        if (this.over) (this.#wake.delete(reader), resolve("over"));
      };
      this.#wake.add(reader);
      reader();
    });
  }
}

// scripts: by prompt, an async function of the turn; {problem: {...}} refuses before the first event. Any other prompt is 404.
export async function startGateway(scripts, { publishesKeys = true } = {}) {
  const gateway = { key: newKey(), requests: [], turns: [] };
  const known = new Map();

  function begin(request) {
    const script = scripts[request.messages.at(-1).content];
    const problem = script?.problem ?? (script === undefined && { code: "not_found", status: 404, retryable: false, detail: "no such script" });
    if (problem) return { problem };
    const turn = new Turn(gateway, request);
    known.set(turn.id, turn);
    gateway.turns.push(turn);
    Promise.resolve(script(turn)).catch((error) => turn.say("error", { code: "internal_error", message: String(error), retryable: false }));
    turn.stopped.then(() => turn.say("error", { code: "stopped", message: "the turn was stopped on purpose", retryable: false, verdict: turn.verdict("allowed", {}) }));
    return { turn };
  }

  const server = createServer(async (request, response) => {
    const { pathname } = new URL(request.url, "http://gateway");
    gateway.requests.push(`${request.method} ${pathname}`);
    if (pathname === "/.well-known/jwks.json" && publishesKeys) return response.setHeader("content-type", "application/json").end(JSON.stringify({ keys: [gateway.key.jwk] }));
    if (!pathname.startsWith(PATH)) return asset(pathname, response);
    if (request.headers.authorization !== `Bearer ${TOKEN}`) return problem(response, { status: 401, code: "unauthenticated", retryable: false, detail: "no valid credential came with the request" });
    const [id, verb] = pathname.slice(PATH.length + 1).split("/");
    if (request.method === "POST" && id === "") {
      const { turn, problem: refusal } = begin(JSON.parse(Buffer.concat(await request.toArray()).toString()));
      return refusal ? problem(response, refusal) : stream(response, turn, -1);
    }
    const turn = known.get(id);
    if (turn === undefined) return problem(response, { status: 404, code: "session_not_found", retryable: false, detail: "there is no such session or turn" });
    if (verb === "stop") return (turn.stop(), response.writeHead(202).end());
    if (verb === "confirm") {
      const [status, code] = turn.confirm(JSON.parse(Buffer.concat(await request.toArray()).toString()));
      return code ? problem(response, { status, code, retryable: false, detail: "not taken" }) : response.writeHead(202).end();
    }
    const last = request.headers["last-event-id"];
    stream(response, turn, last === undefined ? -1 : Number(last.split(":")[1]));
  });

  async function stream(response, turn, after) {
    response.writeHead(200, {
      "content-type": "text/event-stream", "cache-control": "no-store", "x-headgate-turn": turn.id, traceparent: `00-${turn.trace}-00f067aa0ba902b7-01`,
    });
    const write = ({ seq, name, data }) => response.write(`id: ${turn.id}:${seq}\nevent: ${name}\ndata: ${JSON.stringify(data)}\n\n`);
    response.write(": \n\n");
    if ((await turn.read(after, write)) === "cut") response.socket.destroy();
    else response.end();
  }

  const sockets = new WebSocketServer({ noServer: true, handleProtocols: (offered) => (offered.has("headgate.v1") ? "headgate.v1" : false) });
  server.on("upgrade", (request, socket, head) => {
    gateway.requests.push(`WS ${request.url}`);
    const offered = (request.headers["sec-websocket-protocol"] ?? "").split(",").map((word) => word.trim());
    sockets.handleUpgrade(request, socket, head, (ws) => converse(ws, offered.includes(`bearer.${TOKEN}`)));
  });

  function converse(ws, isKnown) {
    const tell = (frame) => ws.readyState === ws.OPEN && ws.send(JSON.stringify(frame));
    const speak = async (turn, after, ref) => {
      const write = ({ seq, name, data }) => tell({ type: name, ...(name === "open" && ref ? { ref } : { turn_id: turn.id }), seq, ...data });
      if ((await turn.read(after, write)) === "cut") ws.terminate();
    };
    ws.on("message", (message) => {
      const { type, ref, turn_id: id, after, token, ...request } = JSON.parse(message);
      if (type === "auth") return (isKnown = token === TOKEN);
      if (!isKnown) {
        tell({ type: "error", ref, code: "unauthenticated", message: "no valid credential came with the request", retryable: false });
        return ws.close(3000, "unauthenticated");
      }
      if (type === "turn") {
        const { turn, problem: refusal } = begin(request);
        if (refusal) return tell({ type: "error", ref, code: refusal.code, message: refusal.detail, retryable: refusal.retryable, retry_after_ms: refusal.retry_after_ms });
        return speak(turn, -1, ref);
      }
      const turn = known.get(id);
      if (turn === undefined) return tell({ type: "error", turn_id: id, code: "session_not_found", message: "there is no such session or turn", retryable: false });
      if (type === "stop") turn.stop();
      if (type === "confirm") {
        const [, code] = turn.confirm(request);
        if (code) tell({ type: "error", turn_id: id, code, message: "not taken", retryable: false });
      }
      if (type === "resume") speak(turn, after ?? -1, null);
    });
  }

  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  gateway.url = `http://127.0.0.1:${server.address().port}/`;
  gateway.forget = (id) => known.delete(id);
  gateway.close = () => {
    for (const turn of gateway.turns) turn.over = true;
    for (const ws of sockets.clients) ws.terminate();
    server.closeAllConnections();
    return new Promise((resolve) => server.close(resolve));
  };
  return gateway;
}

function asset(pathname, response) {
  const name = pathname === "/" ? "index.html" : pathname.slice(1);
  if (!/^[a-z]+\.[a-z]+$/.test(name)) return response.writeHead(404).end();
  try {
    const bytes = readFileSync(new URL(name, PAGE));
    response.writeHead(200, { "content-type": `${KINDS[extname(name)]}; charset=utf-8`, "content-security-policy": POLICY, "cache-control": "no-store", "x-content-type-options": "nosniff" });
    response.end(bytes);
  } catch {
    response.writeHead(404).end();
  }
}

function problem(response, body) {
  const wait = body.retry_after_ms ? { "retry-after": String(Math.ceil(body.retry_after_ms / 1000)) } : {};
  response.writeHead(body.status, { "content-type": "application/problem+json", ...wait }).end(JSON.stringify(body));
}

function newKey() {
  const { publicKey, privateKey } = generateKeyPairSync("ed25519");
  const { x } = publicKey.export({ format: "jwk" });
  const kid = createHash("sha256").update(`{"crv":"Ed25519","kty":"OKP","x":"${x}"}`).digest("base64url");
  return { kid, privateKey, jwk: { kty: "OKP", crv: "Ed25519", use: "sig", alg: "Ed25519", kid, x, state: "current", nbf: 0 } };
}
