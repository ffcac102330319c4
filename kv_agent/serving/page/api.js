// The server's routes. Addresses are relative to the page's, so that it works behind any prefix.

const ROOT = new URL(".", location.href).pathname.replace(/\/$/, "");
const KEY = "kv_agent.key";
const NAMESPACE = "kv_agent.namespace";

/** What the server refused, in its own words; status 0 where it could not be reached. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** The key and, for an admin, the namespace that is looked into; gone with the browser's tab. */
export const session = {
  get key() {
    return sessionStorage.getItem(KEY);
  },
  set key(key) {
    set(KEY, key);
  },
  get namespace() {
    return sessionStorage.getItem(NAMESPACE);
  },
  set namespace(namespace) {
    set(NAMESPACE, namespace);
  },
};

function set(name, value) {
  if (value) sessionStorage.setItem(name, value);
  else sessionStorage.removeItem(name);
}

/** The answer's JSON; raises `Refused`. `health` answers 503 with what is wrong, which is an answer, too. */
export async function ask(method, path, { parameters, body, signal } = {}) {
  const headers = {};
  if (session.key) headers.Authorization = `Bearer ${session.key}`;
  if (session.namespace) headers["X-Memory-Namespace"] = header(session.namespace);
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const query = parameters ? `?${new URLSearchParams(parameters)}` : "";
  let answer;
  try {
    answer = await fetch(`${ROOT}${path}${query}`, {
      method,
      headers,
      signal,
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, `The server cannot be reached (${error.message}). Does it run?`);
  }
  const said = await answer.json().catch(() => null);
  if (answer.ok || (path === "/health" && said?.status)) return said;
  const message = said?.error?.message ?? `The server answered ${answer.status} ${answer.statusText}`.trim();
  throw new Refused(answer.status, message);
}

// A header holds bytes, which the server reads as Latin-1.
function header(text) {
  if (/[^\x20-\xff]/.test(text)) throw new Refused(0, "No header can name a namespace with such characters.");
  return text;
}

export const get = (path, parameters, signal) => ask("GET", path, { parameters, signal });

/** Where events come from; browsers can name the key in the address only. */
export function streamAddress() {
  const address = new URL(`${ROOT}/stream`, location.href);
  address.protocol = address.protocol === "https:" ? "wss:" : "ws:";
  if (session.key) address.searchParams.set("key", session.key);
  if (session.namespace) address.searchParams.set("namespace", session.namespace);
  return address;
}

export const memoryPath = (id) => `/${encodeURIComponent(id)}`;

/** Leave out what is empty. */
export const given = (fields) =>
  Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== "" && value !== null));
