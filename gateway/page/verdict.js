// Reads a signed verdict, and checks it as far as a browser can: signature, addressee, and the text it was given for.

const JWKS = "/.well-known/jwks.json";
const MAX_CHARS = 8192;

const CLAIMS = {
  iss: "Signed by",
  aud: "Meant for",
  iat: "Signed at",
  exp: "Good until",
  jti: "Number",
  tid: "Tenant",
  sub: "Subject",
  sid: "Session",
  turn: "Turn",
  dir: "Judged",
  bdg: "Digest of the text",
  dec: "Decision",
  cat: "Categories",
  pol: "Policy",
  con: "Constitution",
  mode: "Mode",
  fence: "Training fence",
  trc: "Trace",
};

// The header and claims of a compact JWS; null for anything else.
export function decode(jws) {
  const parts = typeof jws === "string" && jws.length <= MAX_CHARS ? jws.split(".") : [];
  if (parts.length !== 3) return null;
  try {
    const [header, claims] = parts.slice(0, 2).map((part) => JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes(part))));
    const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
    return isObject(header) && isObject(claims) ? { header, claims, signed: parts.slice(0, 2).join("."), signature: bytes(parts[2]) } : null;
  } catch {
    return null;
  }
}

// The claims as [name, what it is, value] for people.
export function describe(claims) {
  return Object.entries(claims).map(([name, value]) => [name, CLAIMS[name] ?? "", shown(name, value)]);
}

function shown(name, value) {
  if ((name === "iat" || name === "exp") && Number.isFinite(value)) return new Date(value * 1000).toISOString().replace(".000Z", "Z");
  if (name === "pol" && value?.id !== undefined) return `${value.id}, version ${value.ver}`;
  if (Array.isArray(value)) return value.length === 0 ? "none" : value.join(", ");
  return typeof value === "string" ? value : JSON.stringify(value);
}

// What was checked, as [what, "yes" | "no" | "unknown", why].
export async function check(verdict, turn) {
  const { header, claims } = verdict;
  return [
    ["Signature", ...(await checkSignature(verdict))],
    ["Turn", ...(claims.turn === turn.id ? ["yes", "is this one"] : ["no", "is another one"])],
    ["Text", ...(await checkText(claims.bdg, turn))],
    ["Kind", ...(header.typ === "policy-verdict+jwt" && claims.dir === "output" ? ["yes", "a verdict on an answer"] : ["no", "not a verdict on an answer"])],
  ];
}

async function checkSignature({ header, signed, signature }) {
  if (header.alg !== "Ed25519") return ["no", "not the algorithm verdicts are signed with"];
  if (!globalThis.crypto?.subtle) return ["unknown", "not checked: the browser signs and checks only on https or localhost"];
  const keys = await publishedKeys();
  if (keys === null) return ["unknown", "not checked: this gateway does not publish its keys here"];
  const jwk = keys.find((key) => key?.kid === header.kid && key.kty === "OKP" && key.crv === "Ed25519");
  if (jwk === undefined) return ["no", "by a key that this gateway does not publish"];
  let key;
  try {
    key = await crypto.subtle.importKey("jwk", { kty: jwk.kty, crv: jwk.crv, x: jwk.x }, { name: "Ed25519" }, false, ["verify"]);
  } catch {
    return ["unknown", "not checked: this browser does not know Ed25519"];
  }
  const good = await crypto.subtle.verify("Ed25519", key, signature, new TextEncoder().encode(signed));
  return good ? ["yes", `valid, by the gateway's ${jwk.state ?? "published"} key`] : ["no", "not valid"];
}

async function publishedKeys() {
  try {
    const response = await fetch(JWKS, { credentials: "omit", cache: "no-cache" });
    const keys = response.ok ? (await response.json()).keys : null;
    return Array.isArray(keys) ? keys : null;
  } catch {
    return null;
  }
}

async function checkText(digest, turn) {
  if (!turn.isWhole) return ["unknown", "not checked: events are missing"];
  if (!globalThis.crypto?.subtle) return ["unknown", "not checked: the browser has no digests here"];
  const hash = new Uint8Array(await crypto.subtle.digest("SHA-256", new TextEncoder().encode(turn.text)));
  const ours = `sha-256=:${btoa(String.fromCharCode(...hash))}:`;
  return digest === ours ? ["yes", "what this page received is what was signed"] : ["no", "this page received other text than was signed"];
}

function bytes(base64url) {
  if (!/^[A-Za-z0-9_-]*$/.test(base64url)) throw new Error("not base64url");
  return Uint8Array.from(atob(base64url.replaceAll("-", "+").replaceAll("_", "/")), (char) => char.charCodeAt(0));
}
