// The browser of the tests: the system's Chromium, told to stay at home.

import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { chromium } from "playwright-core";

const CHROMIUM = process.env.CHROMIUM ?? "/usr/bin/chromium";
const FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"];

export function launch() {
  assert.ok(existsSync(CHROMIUM), `no browser at ${CHROMIUM}: run scripts/tools.sh, or name one in CHROMIUM`);
  return chromium.launch({ executablePath: CHROMIUM, args: FLAGS });
}
