// The page: which view the address asks for, and images that are dropped or pasted.

import { startClassify } from "/static/classify.js";
import { startDetails } from "/static/details.js";
import { ask, byId, send, showError, whole } from "/static/dom.js";
import { startSearch } from "/static/search.js";

const page = {
  info: null,
  /** Go to an address of this page; its parts follow. */
  go(parameters, { replace = false } = {}) {
    const text = parameters.toString();
    const address = text ? `/?${text}` : "/";
    if (replace || address === location.pathname + location.search) {
      history.replaceState(null, "", address);
    } else {
      history.pushState(null, "", address);
    }
    show();
  },
};

let views;

function show() {
  const parameters = new URLSearchParams(location.search);
  const shown = parameters.get("view") === "classify" ? "classify" : "search";
  showError(null);
  for (const name of ["search", "classify"]) {
    byId(name).hidden = name !== shown;
    const link = byId(`to-${name}`);
    if (name === shown) {
      link.setAttribute("aria-current", "page");
      link.href = location.pathname + location.search;
    } else {
      link.removeAttribute("aria-current");
    }
  }
  byId("details").close();
  views[shown].show(parameters);
}

/** An image that was chosen, dropped or pasted goes to the view that is open. */
async function take(file) {
  showError(null);
  const view = views[byId("classify").hidden ? "search" : "classify"];
  view.busy(true);
  try {
    view.take(await send(file));
  } catch (error) {
    showError(error);
  } finally {
    view.busy(false);
  }
}

function listenForImages() {
  const file = byId("file");
  for (const id of ["choose", "subject"]) {
    byId(id).addEventListener("click", () => file.click());
  }
  file.addEventListener("change", () => {
    if (file.files.length) take(file.files[0]);
    file.value = "";
  });
  const carried = (event) => [...(event.dataTransfer ?? event.clipboardData).files][0];
  const isFile = (event) => event.dataTransfer?.types.includes("Files");
  let depth = 0;
  const landing = (change) => {
    depth = change ? Math.max(0, depth + change) : 0;
    byId("landing").hidden = depth === 0;
  };
  addEventListener("dragenter", (event) => isFile(event) && landing(1));
  addEventListener("dragleave", (event) => isFile(event) && landing(-1));
  addEventListener("dragover", (event) => isFile(event) && event.preventDefault());
  addEventListener("drop", (event) => {
    if (!isFile(event)) return;
    event.preventDefault();
    landing(0);
    if (carried(event)) take(carried(event));
  });
  addEventListener("paste", (event) => {
    if (!carried(event)) return;
    event.preventDefault();
    take(carried(event));
  });
}

function followLinks() {
  for (const link of document.querySelectorAll("header a")) {
    link.addEventListener("click", (event) => {
      if (event.ctrlKey || event.metaKey || event.shiftKey) return;
      event.preventDefault();
      page.go(new URL(link.href).searchParams);
    });
  }
  addEventListener("popstate", show);
}

async function start() {
  byId("search").hidden = false;
  try {
    page.info = await ask("/api/info");
  } catch (error) {
    showError(error);
    return;
  }
  byId("about").textContent = `${whole(page.info.count)} images · ${page.info.model}`;
  const details = startDetails(page);
  views = { search: startSearch(page, details), classify: startClassify(page) };
  listenForImages();
  followLinks();
  show();
}

start();
