// One image, large, with what is known of it.

import { byId, element, nameOf, whole } from "/static/dom.js";

export function startDetails(page) {
  const dialog = byId("details");
  let shown = null;

  byId("details-close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  byId("details-similar").addEventListener("click", () => {
    page.go(new URLSearchParams({ like: shown.number }));
  });
  byId("details-classify").addEventListener("click", () => {
    page.go(new URLSearchParams({ view: "classify", number: shown.number }));
  });

  return function open(record) {
    shown = record;
    byId("details-title").textContent = nameOf(record);
    const image = byId("details-image");
    image.src = `/image/${record.number}?v=${page.info.version}`;
    image.alt = nameOf(record);
    byId("details-open").href = image.src;
    const facts = [
      ...("score" in record ? [["similarity", record.score.toFixed(4)]] : []),
      ...Object.entries(record.fields),
      ["size", `${whole(record.width)} × ${whole(record.height)}`],
      ["sample", record.key],
      ["shard", record.shard],
    ];
    byId("details-facts").replaceChildren(
      ...facts.flatMap(([name, value]) => [
        element("dt", { textContent: name }),
        element("dd", { textContent: value }),
      ]),
    );
    dialog.showModal();
  };
}
