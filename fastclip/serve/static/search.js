// The search: its form, its results, and the address that says both.

import { ask, byId, duration, element, nameOf, showError, whole } from "/static/dom.js";

const MOST_IN_A_MENU = 40;

export function startSearch(page, openDetails) {
  const form = byId("query");
  const results = byId("results");
  const fields = Object.entries(page.info.fields).map(([name, values]) => filter(name, values));
  let query = new URLSearchParams(); // of the image, while one is searched by
  let waiting = null;

  byId("options").prepend(...fields.map((field) => field.label));
  byId("exact-label").hidden = !page.info.approximate;

  function parameters() {
    const wanted = new URLSearchParams(query);
    const text = byId("q").value.trim();
    if (!query.size && text) wanted.set("q", text);
    for (const { name, input } of fields) {
      if (input.value) wanted.set(`filter.${name}`, input.value);
    }
    if (byId("k").value !== "48") wanted.set("k", byId("k").value);
    if (byId("exact").checked) wanted.set("exact", "true");
    return wanted;
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (byId("q").value.trim()) query = new URLSearchParams();
    page.go(parameters());
  });
  byId("options").addEventListener("change", () => page.go(parameters()));
  byId("clear").addEventListener("click", () => {
    for (const { input } of fields) input.value = "";
    page.go(parameters());
  });
  byId("chip-remove").addEventListener("click", () => {
    query = new URLSearchParams();
    page.go(parameters());
    byId("q").focus();
  });
  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest("input, textarea, select, dialog");
    if (event.key === "/" && !typing && !byId("search").hidden) {
      event.preventDefault();
      byId("q").select();
    }
  });
  results.addEventListener("keydown", (event) => moveAmong(results, event));

  /** What the address asks for. */
  async function show(asked) {
    byId("q").value = asked.get("q") ?? "";
    byId("k").value = [...byId("k").options].some((o) => o.value === asked.get("k"))
      ? asked.get("k")
      : "48";
    byId("exact").checked = asked.get("exact") === "true";
    for (const { name, input } of fields) {
      input.value = asked.get(`filter.${name}`) ?? "";
      if (input.selectedIndex === -1) input.value = ""; // the server says what is wrong with it
    }
    byId("clear").hidden = ![...asked.keys()].some((name) => name.startsWith("filter."));
    query = new URLSearchParams(
      ["like", "image"].filter((name) => asked.has(name)).map((name) => [name, asked.get(name)]),
    );
    showChip(null);
    waiting?.abort();
    const ours = (waiting = new AbortController());
    const address = addressOf(asked);
    if (!address) {
      showExamples();
      return;
    }
    busy(true);
    try {
      const found = await ask(address, { signal: ours.signal });
      showChip(found.query);
      showResults(found);
      document.title = `${asked.get("q") ?? "By an image"} – fastclip search`;
    } catch (error) {
      if (error.name === "AbortError") return;
      results.replaceChildren();
      byId("status").textContent = "";
      showError(error);
    }
    if (ours === waiting) busy(false);
  }

  function addressOf(asked) {
    const options = new URLSearchParams(asked);
    options.delete("view");
    if (asked.has("like")) {
      options.delete("like");
      return `/api/similar/${encodeURIComponent(asked.get("like"))}?${options}`;
    }
    return asked.has("q") || asked.has("image") ? `/api/search?${options}` : null;
  }

  function showChip(record) {
    byId("chip").hidden = !query.size;
    byId("q").placeholder = query.size ? "or describe a picture" : "Describe a picture";
    if (query.has("image")) {
      byId("chip-image").src = `/upload/${encodeURIComponent(query.get("image"))}`;
      byId("chip-text").textContent = "your image";
    } else if (record) {
      byId("chip-image").src = thumbnail(page, record.number, 160);
      byId("chip-text").textContent = `like “${nameOf(record)}”`;
    }
  }

  function showResults(found) {
    const count = found.results.length;
    byId("status").textContent = count
      ? `${whole(count)} of ${whole(page.info.count)} images, the nearest first · ${duration(found.milliseconds)}`
      : "No image of the index has these properties. Clear a filter to see more.";
    results.replaceChildren(...found.results.map(card));
  }

  function showExamples() {
    busy(false);
    document.title = "fastclip search";
    byId("status").textContent =
      "Some of what is here. Describe what you look for, or drop, paste or choose an image.";
    results.replaceChildren(...page.info.examples.map(card));
  }

  function card(record) {
    const name = nameOf(record);
    const image = element("img", {
      alt: "",
      loading: "lazy",
      decoding: "async",
      src: thumbnail(page, record.number, 320),
    });
    image.addEventListener("error", () => image.closest("button").classList.add("missing"));
    const scored = "score" in record;
    const shot = element(
      "button",
      {
        type: "button",
        className: "shot",
        label: scored ? `${name}, similarity ${record.score.toFixed(3)}` : name,
        data: { number: record.number },
      },
      image,
    );
    shot.addEventListener("click", () => openDetails(record));
    const more = element("button", {
      type: "button",
      className: "text",
      textContent: "Similar",
      label: `Images like ${name}`,
    });
    more.addEventListener("click", () => {
      const wanted = parameters();
      for (const key of ["q", "image", "like"]) wanted.delete(key);
      page.go(new URLSearchParams([["like", record.number], ...wanted]));
      scrollTo({ top: 0 });
    });
    return element(
      "li",
      {},
      shot,
      element("p", { className: "caption", textContent: name, title: name }),
      element(
        "p",
        { className: "beneath" },
        element("span", {
          className: "score",
          textContent: scored ? record.score.toFixed(3) : "",
          title: "Cosine similarity",
        }),
        more,
      ),
    );
  }

  function busy(is) {
    results.setAttribute("aria-busy", String(is));
  }

  return {
    show,
    busy,
    take(token) {
      byId("q").value = "";
      query = new URLSearchParams({ image: token });
      page.go(parameters());
    },
  };
}

export const thumbnail = (page, number, size) =>
  `/thumbnail/${number}?size=${size}&v=${page.info.version}`;

/** A field to filter by: a menu of its values, or a box that suggests them if there are many. */
function filter(name, values) {
  let input;
  const parts = [];
  if (values.length > MOST_IN_A_MENU) {
    const list = element("datalist", { id: `values-${name}` });
    list.append(...values.map((value) => element("option", { value })));
    input = element("input", { type: "text", placeholder: "any", autocomplete: "off" });
    input.setAttribute("list", list.id);
    parts.push(input, list);
  } else {
    const any = element("option", { value: "", textContent: "any" });
    input = element("select", {}, any, ...values.map((value) => element("option", { value, textContent: value })));
    parts.push(input);
  }
  input.name = `filter.${name}`;
  const title = name.charAt(0).toUpperCase() + name.slice(1);
  return { name, input, label: element("label", {}, title, ...parts) };
}

/** Arrow keys go from result to result, as they lie on the screen. */
function moveAmong(results, event) {
  const shots = [...results.querySelectorAll(".shot")];
  const place = shots.indexOf(event.target);
  if (place < 0) return;
  const top = shots[0].offsetTop;
  const columns = Math.max(1, shots.filter((shot) => shot.offsetTop === top).length);
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns };
  const next = shots[place + steps[event.key]];
  if (!next) return;
  event.preventDefault();
  next.focus();
}
