// Reads server-sent events out of a fetched body: WHATWG HTML, section 9.2.6. EventSource will not do, as it can
// neither POST nor send a token.

// The gateway sends no event above 128 KiB; what is larger is not one of its.
const MAX_EVENT_CHARS = 1 << 20;

export class EventParser {
  #rest = "";
  #name = "";
  #data = [];
  #id = "";
  #size = 0;
  #begun = false;

  // heard: told of every event, as {name, id, data}. silence: told of every comment; the gateway's heartbeats are such.
  constructor(heard, silence = () => {}) {
    this.heard = heard;
    this.silence = silence;
  }

  push(text) {
    let all = this.#rest + text;
    if (!this.#begun && all !== "") {
      this.#begun = true;
      all = all.replace(/^\uFEFF/, "");
    }
    let from = 0;
    for (const end of all.matchAll(/\r\n|\n|\r/g)) {
      // A last "\r" may be the first half of a "\r\n".
      if (end[0] === "\r" && end.index === all.length - 1) break;
      this.#line(all.slice(from, end.index));
      from = end.index + end[0].length;
    }
    this.#rest = all.slice(from);
    if (this.#size + this.#rest.length > MAX_EVENT_CHARS) throw new Error("an event is larger than any of the gateway's");
  }

  #line(line) {
    if (line === "") return this.#dispatch();
    if (line.startsWith(":")) return this.silence();
    const colon = line.indexOf(":");
    const field = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    this.#size += line.length;
    if (field === "data") this.#data.push(value);
    else if (field === "event") this.#name = value;
    else if (field === "id" && !value.includes("\0")) this.#id = value;
  }

  #dispatch() {
    if (this.#data.length > 0) this.heard({ name: this.#name || "message", id: this.#id, data: this.#data.join("\n") });
    this.#name = "";
    this.#id = "";
    this.#data = [];
    this.#size = 0;
  }
}

// Reads a whole body; ends when it ends, throws when it is cut or is no event stream.
export async function readEvents(body, heard, silence) {
  const parser = new EventParser(heard, silence);
  const decoder = new TextDecoder();
  const reader = body.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      parser.push(done ? decoder.decode() : decoder.decode(value, { stream: true }));
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
