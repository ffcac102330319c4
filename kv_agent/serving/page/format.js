// Numbers, sizes and times as people read them.

import { el } from "./dom.js";

const plain = new Intl.NumberFormat("en");
const short = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
const exact = new Intl.DateTimeFormat("en", { dateStyle: "medium", timeStyle: "medium", hourCycle: "h23" });
const clock = new Intl.DateTimeFormat("en", { timeStyle: "medium", hourCycle: "h23" });
const relative = new Intl.RelativeTimeFormat("en", { numeric: "auto" });

const SIZES = ["B", "kB", "MB", "GB", "TB", "PB"];
const SPANS = [
  ["year", 31557600],
  ["month", 2629800],
  ["week", 604800],
  ["day", 86400],
  ["hour", 3600],
  ["minute", 60],
  ["second", 1],
];

export const count = (number) => plain.format(number);

export const some = (number, one, more = `${one}s`) => `${count(number)} ${number === 1 ? one : more}`;

export const score = (number) => short.format(number);

export const percent = (share) => `${Math.round(share * 100)} %`;

/** Of milliseconds. */
export const took = (ms) => (ms < 1000 ? `${short.format(ms)} ms` : `${short.format(ms / 1000)} s`);

export function bytes(number) {
  const power = number < 1 ? 0 : Math.min(Math.floor(Math.log10(number) / 3), SIZES.length - 1);
  return `${short.format(number / 1000 ** power)} ${SIZES[power]}`;
}

/** Of seconds, in the largest unit that fits. */
export function span(seconds) {
  const [unit, length] = largest(seconds);
  return some(Math.round(seconds / length), unit);
}

// 59.9 minutes are an hour: what they round to in the next smaller unit decides.
function largest(seconds) {
  const fits = ([, length], index) => {
    const below = SPANS[index + 1]?.[1] ?? 1;
    return Math.round(Math.abs(seconds) / below) * below >= length;
  };
  return SPANS.find(fits) ?? SPANS.at(-1);
}

/** A Unix time as how long ago it was, or how far off it is; its title is the time itself. */
export function when(time) {
  const date = new Date(time * 1000);
  return el("time", { datetime: date.toISOString(), title: exact.format(date) }, fromNow(time));
}

function fromNow(time) {
  const seconds = time - Date.now() / 1000;
  if (Math.abs(seconds) < 5) return "just now";
  const [unit, length] = largest(seconds);
  return relative.format(Math.round(seconds / length), unit);
}

/** A Unix time as the time of day. */
export function timeOfDay(time) {
  const date = new Date(time * 1000);
  return el("time", { datetime: date.toISOString(), title: exact.format(date) }, clock.format(date));
}

export const clockText = (time) => clock.format(new Date(time * 1000));

/** The beginning of an id, which is enough to tell it from others. */
export const shortId = (id) => (id.length > 12 ? `${id.slice(0, 8)}…` : id);

/** A text on one line, its beginning at least. */
export function line(text, most = 220) {
  const flat = text.replace(/\s+/g, " ").trim();
  return flat.length > most ? `${flat.slice(0, most).trimEnd()}…` : flat;
}

/** Whose something is, in words. */
export function who(owner) {
  const agent = owner.agent_id && `agent ${owner.agent_id}`;
  const session = owner.session_id && `session ${owner.session_id}`;
  return [owner.user_id, agent, session].filter(Boolean).join(" · ");
}
