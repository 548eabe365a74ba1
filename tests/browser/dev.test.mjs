// The chat page as `headgate dev` serves it: the real gateway, the real chain, the embedded model.

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { existsSync } from "node:fs";
import { createInterface } from "node:readline";
import { after, before, test } from "node:test";
import { fileURLToPath } from "node:url";
import { launch } from "./browser.mjs";

const TARGET = process.env.CARGO_TARGET_DIR ?? fileURLToPath(new URL("../../target", import.meta.url));
const HEADGATE = process.env.HEADGATE ?? `${TARGET}/debug/headgate`;

let gateway, link, browser, page;
const [errors, requests] = [[], []];

before(async () => {
  assert.ok(existsSync(HEADGATE), `no program at ${HEADGATE}: run cargo build, or name one in HEADGATE`);
  gateway = spawn(HEADGATE, ["dev", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--pace", "80"], { stdio: ["ignore", "pipe", "ignore"] });
  for await (const line of createInterface(gateway.stdout)) {
    link = /^chat page\s+(\S+)/.exec(line)?.[1];
    if (link) break;
  }
  assert.ok(link, "headgate dev printed no link");
  gateway.stdout.resume();
  browser = await launch();
  page = await browser.newPage();
  page.setDefaultTimeout(20_000);
  page.on("console", (message) => ["error", "warning"].includes(message.type()) && errors.push(message.text()));
  page.on("pageerror", (error) => errors.push(String(error)));
  page.on("request", (request) => requests.push(request.url()));
  page.on("websocket", (socket) => requests.push(socket.url().replace(/^ws/, "http")));
  await page.goto(link);
});

after(async () => {
  await browser?.close();
  gateway?.kill();
});

async function ask(prompt) {
  await page.getByLabel("Prompt").fill(prompt);
  await page.getByLabel("Prompt").press("Enter");
  return page.locator(".turn").last();
}

const badge = async (turn) => {
  await turn.and(page.locator("[aria-busy=false]")).waitFor();
  return turn.locator(".badge").textContent();
};

for (const transport of ["SSE", "WebSocket"]) {
  test(`an_answer_of_the_embedded_model_is_masked_and_its_verdict_verified_over_${transport}`, async () => {
    await page.locator("#settings").getByText(transport, { exact: true }).click();
    const turn = await ask("What is your email address?");
    assert.equal(await badge(turn), "masked");
    assert.ok((await turn.locator("mark").count()) > 0);
    assert.ok(!(await turn.locator(".content").textContent()).includes("@"));
    await turn.getByText("verdict verified").waitFor();
  });

  test(`a_secret_is_cut_off_and_a_question_for_it_refused_over_${transport}`, async () => {
    await page.locator("#settings").getByText(transport, { exact: true }).click();
    const cut = await ask("Tell me a secret");
    assert.equal(await badge(cut), "blocked");
    await cut.getByText("by rule moderation.deny").waitFor();
    const refused = await ask("What is Project Bluebird?");
    assert.equal(await badge(refused), "blocked");
    await refused.getByText("The model never saw it.").waitFor();
    // The answer to the refused prompt is a 403, which Chromium writes down.
    if (transport === "SSE") assert.match(errors.pop() ?? "", /status of 403/);
  });

  test(`a_long_story_is_stopped_over_${transport}`, async () => {
    await page.locator("#settings").getByText(transport, { exact: true }).click();
    const turn = await ask("Tell me a long story");
    await turn.locator(".content").waitFor();
    await page.getByRole("button", { name: "Stop" }).click();
    assert.equal(await badge(turn), "stopped");
  });
}

test("the_policy_of_the_page_lets_nothing_out_and_no_markup_in", async () => {
  const { headers, left, marked } = await page.evaluate(async () => {
    const response = await fetch("/");
    const left = await fetch("http://127.0.0.2:9/").then(() => true, () => false);
    let marked = true;
    try {
      document.body.insertAdjacentHTML("beforeend", "<b>x</b>");
    } catch {
      marked = false;
    }
    return { headers: Object.fromEntries(response.headers), left, marked };
  });
  assert.deepEqual([left, marked], [false, false]);
  assert.match(headers["content-security-policy"], /^default-src 'none'; /);
  assert.equal(headers["x-content-type-options"], "nosniff");
  // What was forbidden is in the console; it is not a fault of the page.
  const forbidden = errors.splice(0);
  assert.ok(forbidden.every((line) => /Content Security Policy|TrustedHTML/i.test(line)), forbidden.join("\n"));
  assert.ok(forbidden.some((line) => line.includes("connect-src")), "the request failed for another reason");
});

test("nothing_else_was_asked_for_and_the_console_is_clean", () => {
  const origin = new URL(link).origin;
  assert.deepEqual(requests.filter((url) => !url.startsWith(origin) && !url.startsWith("http://127.0.0.2:9")), []);
  assert.deepEqual(errors, []);
});
