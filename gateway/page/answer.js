// Shows one turn: the prompt, the answer as it streams, and what became of it.

import { el, sparkline } from "./dom.js";
import { time } from "./gaps.js";
import { explain } from "./turn.js";
import { check, decode, describe } from "./verdict.js";

// What policy puts in place of masked text.
const MASK = /(•{3,})/;
const BULLETS_AT_END = /•+$/;

// One lane's text. Masks are marked as they come, also where the border of two events cuts one.
class Lane {
  // The text node at the end that takes more text; null after a mask.
  #text = null;
  // Bullets at the end may go on in the next piece, so what they are is decided again then.
  #tail = null;
  #bullets = "";

  constructor(element) {
    this.element = element;
  }

  push(text) {
    const all = this.#bullets + text;
    this.#tail?.remove();
    this.#bullets = BULLETS_AT_END.exec(all)?.[0] ?? "";
    for (const part of all.slice(0, all.length - this.#bullets.length).split(MASK)) this.#add(part);
    this.#tail = this.#bullets === "" ? null : piece(this.#bullets);
    if (this.#tail !== null) this.element.append(this.#tail);
  }

  #add(part) {
    if (part === "") return;
    const node = piece(part);
    const isText = node instanceof Text;
    if (isText && this.#text !== null) this.#text.appendData(part);
    else this.element.append(node);
    this.#text = isText ? (this.#text ?? node) : null;
  }
}

function piece(text) {
  if (!/^•{3,}$/.test(text)) return document.createTextNode(text);
  return el("mark", { className: "mask", title: "masked by policy", role: "img", "aria-label": "masked" }, text);
}

export class Answer {
  #lanes = new Map();
  #framed = false;
  #settled = false;
  // What is asked now, and how its buttons are taken away.
  #question = null;

  // confirm: told the question's id and the answer, gives why that was not taken, or null.
  constructor(prompt, transport, confirm) {
    this.confirm = confirm;
    this.body = el("div", { className: "lanes" });
    this.notice = el("div", { className: "notice", hidden: true });
    this.troubles = el("ul", { className: "troubles", hidden: true });
    this.badge = el("span", { className: "badge waiting" }, "waiting");
    this.measures = el("span", { className: "measures" });
    this.held = el("span", { className: "measure check", hidden: true });
    this.facts = el("dl", { className: "facts" });
    this.verdict = el("section", { className: "verdict", hidden: true });
    this.more = el("details", { className: "more", hidden: true }, el("summary", {}, "Details"), this.facts, this.verdict);
    this.element = el(
      "article",
      { className: "turn", ariaBusy: "true" },
      el("p", { className: "asked" }, el("span", { className: "unseen" }, "You: "), prompt),
      el("div", { className: "answer" }, el("span", { className: "unseen" }, "Answer: "), this.body, this.notice, this.troubles,
        el("p", { className: "line" }, this.badge, this.measures, this.held), this.more),
    );
    this.transport = transport;
  }

  // The turn has changed; event: what came, where something came.
  show(turn, event) {
    if (event?.name === "text" && typeof event.data.text === "string") this.#lane(event.data).push(event.data.text);
    else if (event?.name === "tool") this.#tool(event.data);
    if (this.#question !== null && turn.asked !== this.#question.asked) this.#question.close();
    if (event?.name === "confirm" && turn.asked !== null) this.#ask(turn.asked);
    if (turn.end !== null) return this.#settle(turn);
    // Numbers that nobody can read in between are not drawn.
    if (this.#framed) return;
    this.#framed = true;
    requestAnimationFrame(() => {
      this.#framed = false;
      if (turn.end === null) this.#progress(turn);
    });
  }

  #lane({ lane = "content", choice = 0, tool = 0 }) {
    const key = `${choice} ${lane} ${lane === "tool_arguments" ? tool : ""}`;
    let found = this.#lanes.get(key);
    if (found === undefined) {
      const text = el("div", { className: `lane ${lane === "content" ? "content" : "aside"}` });
      const title = `${{ content: "Answer", reasoning: "Reasoning", refusal: "The model declines", tool_arguments: "Tool arguments" }[lane] ?? lane}${choice > 0 ? `, choice ${choice}` : ""}`;
      if (lane === "reasoning") this.body.append(el("details", { className: "reasoning" }, el("summary", {}, title), text));
      else if (lane === "content" && choice === 0) this.body.append(text);
      else this.body.append(el("p", { className: "lane-name" }, title), text);
      found = new Lane(text);
      this.#lanes.set(key, found);
    }
    return found;
  }

  #tool({ name, index, choice = 0 }) {
    this.body.append(el("p", { className: "lane-name" }, `Calls the tool ${name}${choice > 0 ? `, choice ${choice}` : ""}`));
    const text = el("div", { className: "lane aside" });
    this.body.append(text);
    this.#lanes.set(`${choice} tool_arguments ${index}`, new Lane(text));
  }

  // Asks whether a tool may be called. What stands there was composed of a model's words: it is text, and says so.
  #ask(asked) {
    const text = el("div", { className: "lane" });
    new Lane(text).push(asked.prompt);
    const [yes, no] = ["Yes, call it", "No"].map((word) => el("button", { type: "button" }, word));
    const note = el("p", { className: "advice" }, "The model wrote these arguments. Nothing happens until you answer.");
    const title = `May ${asked.tool ? `the tool ${asked.tool}` : "a tool"} be called?`;
    const box = el("section", { className: "question", role: "group", "aria-label": title }, el("p", { className: "lane-name" }, title), text, note, el("p", { className: "answers" }, yes, no));
    const close = () => {
      yes.disabled = no.disabled = true;
      this.#question = null;
    };
    const say = async (accept) => {
      yes.disabled = no.disabled = true;
      note.textContent = accept ? "You said yes." : "You said no.";
      const why = await this.confirm(asked.id, accept);
      if (why === null) return;
      note.textContent = `The answer was not taken: ${why}.`;
      if (this.#question?.asked === asked) yes.disabled = no.disabled = false;
    };
    yes.addEventListener("click", () => say(true));
    no.addEventListener("click", () => say(false));
    this.#question = { asked, close };
    this.body.append(box);
  }

  #progress(turn) {
    const isTrying = turn.troubles.at(-1)?.endsWith("coming back");
    this.#badge(...(isTrying ? ["coming back", "failed"] : turn.asked !== null ? ["asks you", "waiting"] : turn.firstTextMs === null ? ["waiting", "waiting"] : ["streaming", "waiting"]));
    this.#measure(turn);
  }

  #badge(word, tone) {
    if (this.badge.textContent !== word) this.badge.textContent = word;
    this.badge.className = `badge ${tone}`;
  }

  #measure(turn) {
    const { gaps } = turn;
    const parts = [];
    if (turn.firstTextMs !== null) parts.push(el("span", { className: "measure", title: "from Send to the first text" }, "first text ", el("b", {}, time(turn.firstTextMs))));
    if (turn.events > 0) parts.push(el("span", { className: "measure" }, el("b", {}, String(turn.events)), turn.events === 1 ? " event" : " events"));
    const median = gaps.median();
    if (median !== null) {
      const words = `${time(median)} median, ${time(gaps.max)} longest`;
      parts.push(el("span", { className: "measure", title: "time between two pieces of text" }, "gaps ", el("b", {}, time(median)), " median, ", el("b", {}, time(gaps.max)), " longest"));
      parts.push(sparkline(gaps.bars(), `Gaps between events: ${words}`));
    }
    this.measures.replaceChildren(...parts);
    this.troubles.hidden = turn.troubles.length === 0;
    while (this.troubles.children.length < turn.troubles.length) {
      this.troubles.append(el("li", {}, turn.troubles[this.troubles.children.length]));
    }
  }

  #settle(turn) {
    this.#measure(turn);
    if (this.#settled) return;
    this.#settled = true;
    const { word, tone, lines, advice } = explain(turn.end);
    this.element.ariaBusy = "false";
    this.#badge(word, tone);
    // Bullets in an answer that nothing was masked in are the model's own.
    if (word === "allowed") this.body.querySelectorAll(".mask").forEach((mark) => mark.replaceWith(mark.textContent));
    const masked = this.body.querySelectorAll(".mask").length;
    const all = masked > 0 && turn.end.kind === "done" ? [`Policy masked ${masked === 1 ? "one part" : `${masked} parts`} of this answer.`, ...lines] : lines;
    this.notice.className = `notice ${tone}`;
    this.notice.replaceChildren(...all.map((line) => el("p", {}, line)), ...(advice === null ? [] : [el("p", { className: "advice" }, advice)]));
    this.notice.hidden = this.notice.children.length === 0;
    this.#fill(turn);
    if (turn.end.verdict !== undefined) this.#judge(turn);
  }

  #fill(turn) {
    const { open, usage, end } = turn;
    const rows = [
      ["Transport", this.transport],
      ["Turn", turn.id],
      ["Session", open?.session_id],
      ["Trace", turn.trace],
      ["Model", open?.model],
      ["Policy version", open?.policy_version],
      ["Constitution hash", open?.constitution_hash],
      ["Finish", end.finish?.replaceAll("_", " ")],
      ["Code", end.code],
      ["Tokens", usage === null ? null : `${usage.input_tokens} read, ${usage.output_tokens} written`],
      ["Heartbeats", turn.heartbeats > 0 ? String(turn.heartbeats) : null],
    ];
    const told = rows.filter(([, value]) => value !== null && value !== undefined && value !== "");
    this.more.hidden = false;
    this.facts.replaceChildren(...told.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
  }

  async #judge(turn) {
    const verdict = decode(turn.end.verdict);
    this.verdict.hidden = false;
    this.more.firstChild.textContent = "Details and verdict";
    if (verdict === null) {
      this.verdict.replaceChildren(el("h3", {}, "Verdict"), el("p", { className: "check no" }, "What came as a verdict cannot be read."));
      return;
    }
    // Over a WebSocket no header names the trace; the verdict does.
    if (turn.trace === null && typeof verdict.claims.trc === "string") {
      turn.trace = verdict.claims.trc;
      this.#fill(turn);
    }
    const checks = el("ul", { className: "checks" }, el("li", { className: "check unknown" }, "checking"));
    this.verdict.replaceChildren(
      el("h3", {}, "Signed verdict"), checks,
      table("Claims", describe(verdict.claims)),
      table("Header", Object.entries(verdict.header).map(([name, value]) => [name, "", typeof value === "string" ? value : JSON.stringify(value)])),
      el("details", { className: "raw" }, el("summary", {}, "As it came"), el("code", {}, turn.end.verdict)),
    );
    const found = await check(verdict, turn);
    checks.replaceChildren(...found.map(([what, answer, why]) =>
      el("li", { className: `check ${answer}` }, el("b", {}, what), " ", why)));
    const worst = found.some(([, answer]) => answer === "no") ? "no" : found.some(([, answer]) => answer === "unknown") ? "unknown" : "yes";
    const words = { yes: "verdict verified", no: "verdict does not hold", unknown: "verdict not checked" };
    this.held.className = `measure check ${worst}`;
    this.held.textContent = words[worst];
    this.held.hidden = false;
  }
}

function table(caption, rows) {
  const body = rows.map(([name, meaning, value]) =>
    el("tr", {}, el("th", { scope: "row" }, el("code", {}, name)), el("td", {}, value, meaning === "" ? null : el("small", {}, meaning))));
  return el("table", {}, el("caption", {}, caption), el("tbody", {}, ...body));
}
