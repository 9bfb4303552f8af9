// Zero-shot classification: an image, names, probabilities.

import { ask, byId, duration, element, nameOf, showError } from "/static/dom.js";
import { thumbnail } from "/static/search.js";

export function startClassify(page) {
  const form = byId("question");
  const bars = byId("bars");
  let subject = new URLSearchParams();
  let waiting = null;

  function parameters() {
    const wanted = new URLSearchParams({ view: "classify" });
    for (const [name, value] of subject) wanted.set(name, value);
    const names = byId("names").value.trim();
    if (names) wanted.set("names", names);
    if (byId("template").value.trim()) wanted.set("template", byId("template").value.trim());
    return wanted;
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const names = lines(byId("names").value);
    if (!subject.size) showError(new Error("Choose an image first."));
    else if (names.length < 2) showError(new Error("Name at least two classes, one a line."));
    else page.go(parameters());
  });
  byId("names").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });

  /** What the address asks for; what was typed and not asked yet stays. */
  async function show(asked) {
    document.title = "Classify – fastclip search";
    subject = new URLSearchParams(
      ["number", "image"].filter((name) => asked.has(name)).map((name) => [name, asked.get(name)]),
    );
    if (asked.has("names")) byId("names").value = asked.get("names");
    if (asked.has("template")) byId("template").value = asked.get("template");
    waiting?.abort();
    const ours = (waiting = new AbortController());
    bars.replaceChildren();
    byId("outcome-status").textContent = "Nothing yet.";
    try {
      await showSubject(ours.signal);
      const classes = lines(asked.get("names") ?? "");
      if (!subject.size || classes.length < 2) return;
      busy(true);
      const question = { classes, template: asked.get("template") || "{}" };
      if (subject.has("number")) question.number = Number(subject.get("number"));
      else question.image = subject.get("image");
      const outcome = await ask("/api/zero_shot", {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify(question),
        signal: ours.signal,
      });
      showOutcome(outcome);
    } catch (error) {
      if (error.name === "AbortError") return;
      showError(error);
    }
    if (ours === waiting) busy(false);
  }

  async function showSubject(signal) {
    const image = byId("subject-image");
    image.hidden = !subject.size;
    byId("subject-hint").hidden = Boolean(subject.size);
    byId("subject-caption").textContent = "";
    const button = byId("subject");
    button.setAttribute("aria-label", subject.size ? "Choose another image" : "Choose an image");
    if (subject.has("number")) {
      const number = subject.get("number");
      const record = await ask(`/api/images/${encodeURIComponent(number)}`, { signal });
      image.src = thumbnail(page, record.number, 640);
      byId("subject-caption").textContent = nameOf(record);
    } else if (subject.has("image")) {
      image.src = `/upload/${encodeURIComponent(subject.get("image"))}`;
      byId("subject-caption").textContent = "your image";
    }
  }

  function showOutcome({ classes, logit_scale: scale, milliseconds }) {
    byId("outcome-status").textContent =
      `${classes[0].name} is likeliest · logit scale ${scale.toFixed(1)} · ${duration(milliseconds)}`;
    bars.replaceChildren(
      ...classes.map(({ name, probability, similarity }) => {
        const bar = element("span", { className: "meter" }, element("span"));
        bar.firstChild.style.width = `${100 * probability}%`;
        bar.setAttribute("aria-hidden", "true");
        return element(
          "li",
          { data: { probability }, title: `cosine similarity ${similarity.toFixed(4)}` },
          element("span", { className: "class", textContent: name }),
          element("span", { className: "share", textContent: percent(probability) }),
          bar,
        );
      }),
    );
  }

  function busy(is) {
    bars.setAttribute("aria-busy", String(is));
  }

  return {
    show,
    busy,
    take(token) {
      subject = new URLSearchParams({ image: token });
      page.go(parameters());
    },
  };
}

const lines = (text) => text.split("\n").map((line) => line.trim()).filter(Boolean);

const percent = (share) => (share < 0.001 ? "< 0.1 %" : `${(100 * share).toFixed(1)} %`);
