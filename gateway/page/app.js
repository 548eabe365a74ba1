// The chat page: takes a prompt, sends it through the gate, and shows what comes.

import { Answer } from "./answer.js";
import { SocketTransport, SseTransport } from "./transport.js";
import { explain, Turn } from "./turn.js";

const $ = (id) => document.getElementById(id);
const [settings, composer, prompt, send, stop, turns, status] = ["settings", "composer", "prompt", "send", "stop", "turns", "status"].map($);
const transports = { sse: new SseTransport(), websocket: new SocketTransport() };

let session = null;
// The turn that is going on, with what it takes to stop it.
let current = null;
let isAtEnd = true;

// `headgate dev` prints a link with the token in its fragment, which no server sees. Out of the address bar it goes,
// before it is copied, bookmarked or shown to anybody.
function takeToken() {
  const token = new URLSearchParams(location.hash.slice(1)).get("token");
  if (token === null) return;
  settings.elements.token.value = token;
  history.replaceState(null, "", location.pathname + location.search);
}

async function ask(text) {
  const model = settings.elements.model.value.trim();
  const token = settings.elements.token.value.trim();
  const transport = transports[settings.elements.transport.value];
  // The gateway's side remembers the session: a turn carries only what is new.
  const request = { ...(session && { session_id: session }), messages: [{ role: "user", content: text }], ...(model && { model }) };
  const answer = new Answer(text, transport.name, (id, accept) => transport.confirm(turn, token, id, accept));
  const quit = new AbortController();
  const turn = new Turn(request, transport.name, (turn, event) => {
    answer.show(turn, event);
    if (event?.name === "confirm") say("The model asks whether it may call a tool");
    if (event?.name === "open" && current?.turn === turn) session = event.data.session_id ?? session;
    follow();
  });
  current = { turn, transport, token, quit };
  $("welcome").hidden = true;
  turns.append(answer.element);
  busy(true);
  scrollToEnd();
  say("Waiting for the answer");
  try {
    await transport.run(turn, token, quit.signal);
  } catch {
    turn.cut("What came does not follow the protocol.");
  }
  if (current?.turn !== turn) return;
  current = null;
  busy(false);
  say(`Answer ended: ${explain(turn.end).word}`);
  if (turn.end.code === "unauthenticated" || turn.end.code === "token_expired") $("connection").open = true;
}

async function stopTurn() {
  if (current === null || stop.disabled) return;
  const { turn, transport, token, quit } = current;
  stop.disabled = true;
  if (await transport.stop(turn, token)) return;
  turn.left(turn.id === null ? "Stopped before the answer began." : "The gateway could not be asked to stop, so this page left the turn.");
  quit.abort();
}

function newSession() {
  if (current !== null) {
    current.turn.left("This page left the turn for a new session.");
    current.quit.abort();
    current = null;
  }
  session = null;
  turns.replaceChildren();
  $("welcome").hidden = false;
  busy(false);
  say("New session");
  prompt.focus();
}

function busy(isBusy) {
  // Hiding the button that has the focus would lose the reader's place.
  const hadFocus = document.activeElement === send || document.activeElement === stop;
  send.hidden = isBusy;
  stop.hidden = !isBusy;
  stop.disabled = false;
  if (hadFocus) (isBusy ? stop : prompt).focus();
}

function say(sentence) {
  status.textContent = sentence;
}

function follow() {
  if (isAtEnd) requestAnimationFrame(scrollToEnd);
}

function scrollToEnd() {
  scrollTo({ top: document.documentElement.scrollHeight, behavior: "instant" });
}

function fit() {
  prompt.rows = Math.min(8, prompt.value.split("\n").length);
}

composer.addEventListener("submit", (event) => {
  event.preventDefault();
  const text = prompt.value;
  if (current !== null || text.trim() === "") return;
  prompt.value = "";
  fit();
  ask(text);
});
prompt.addEventListener("input", fit);
prompt.addEventListener("keydown", (event) => {
  // The Enter that ends a composition (Japanese, Chinese, ...) is not one that sends.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  composer.requestSubmit();
});
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.isComposing) stopTurn();
});
addEventListener("scroll", () => {
  isAtEnd = innerHeight + scrollY >= document.documentElement.scrollHeight - 48;
}, { passive: true });
addEventListener("hashchange", takeToken);
settings.addEventListener("submit", (event) => event.preventDefault());
stop.addEventListener("click", stopTurn);
$("new-session").addEventListener("click", newSession);
$("examples").addEventListener("click", (event) => {
  if (!(event.target instanceof HTMLButtonElement) || current !== null) return;
  ask(event.target.textContent);
});

takeToken();
prompt.focus();
