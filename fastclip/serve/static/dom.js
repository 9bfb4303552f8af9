// Elements, requests and words that every part of the page uses.

export const byId = (id) => document.getElementById(id);

/** An element with properties, `data` and children; text is never read as HTML. */
export function element(tag, { data = {}, label, ...properties } = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  Object.assign(made.dataset, data);
  if (label) made.setAttribute("aria-label", label);
  made.append(...children);
  return made;
}

/** The JSON of an answer; an Error in words that can be shown. */
export async function ask(address, options = {}) {
  let answer;
  try {
    answer = await fetch(address, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Is it still running?");
  }
  const content = await answer.json().catch(() => null);
  if (!answer.ok) throw new Error(sentence(content?.error ?? `the server said ${answer.status}`));
  return content;
}

/** Keep an image on the server for this session's questions; returns its token. */
export async function send(file, limit = 10 * 1024 * 1024) {
  if (file.size > limit) throw new Error(`The image has more than ${limit / 1048576} MiB.`);
  const headers = { "Content-Type": file.type || "application/octet-stream" };
  return (await ask("/api/images", { method: "POST", headers, body: file })).image;
}

export function showError(error) {
  const alert = byId("alert");
  alert.hidden = !error;
  alert.textContent = error ? error.message : "";
}

export const whole = (number) => number.toLocaleString("en");

export const nameOf = (record) => record.caption || record.key;

export const duration = (milliseconds) =>
  milliseconds < 10 ? `${milliseconds.toFixed(1)} ms` : `${Math.round(milliseconds)} ms`;

function sentence(text) {
  const begin = /^[a-z]+ /.test(text) ? text.charAt(0).toUpperCase() + text.slice(1) : text;
  return /[.?!]$/.test(begin) ? begin : `${begin}.`;
}
