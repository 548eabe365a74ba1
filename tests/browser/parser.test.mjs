// The page's own parser of server-sent events, without a browser.

import assert from "node:assert/strict";
import { test } from "node:test";
import { EventParser } from "../../gateway/page/sse.js";

function read(chunks) {
  const events = [];
  let silences = 0;
  const parser = new EventParser(({ name, id, data }) => events.push(`${name}|${id}|${data}`), () => (silences += 1));
  for (const chunk of chunks) parser.push(chunk);
  return { events, silences };
}

test("any_cut_of_a_stream_gives_the_same_events", () => {
  const stream = "\uFEFF: \n\nid: t:0\nevent: open\ndata: {}\n\nid:t:1\r\nevent: text\r\ndata: a\r\ndata:  b\r\n\r\n: beat\r\revent: done\rdata\r\rdata: cut";
  const whole = read([stream]);
  assert.deepEqual(whole, { events: ["open|t:0|{}", "text|t:1|a\n b", "done||"], silences: 2 });
  for (let i = 0; i <= stream.length; i++) {
    for (let j = i; j <= stream.length; j++) assert.deepEqual(read([stream.slice(0, i), stream.slice(i, j), stream.slice(j)]), whole, `cut at ${i} and ${j}`);
  }
  assert.deepEqual(read([...stream]), whole);
});

test("an_event_without_data_is_none_and_unknown_fields_are_passed_over", () => {
  assert.deepEqual(read(["event: text\n\nretry: 5\nwhat: x\nevent: text\ndata: y\n\n"]).events, ["text||y"]);
});

test("an_event_without_end_is_given_up_and_not_kept", () => {
  for (const line of ["x".repeat(4096), `data: ${"x".repeat(4096)}\n`]) {
    const parser = new EventParser(() => {});
    assert.throws(() => {
      for (let i = 0; i < 1000; i++) parser.push(line);
    }, /larger than/);
  }
});
