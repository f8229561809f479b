// From a file a page may not read other pages, so the search shows titles without excerpts there.
if (location.protocol === "file:" && typeof DOCUMENTATION_OPTIONS !== "undefined") {
  DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
}

// The arrows that unfold the contents have no words of their own.
document.addEventListener("DOMContentLoaded", () => {
  for (const summary of document.querySelectorAll("summary")) {
    const name = summary.closest("li")?.querySelector("a")?.textContent.trim();
    if (name && !summary.textContent.trim()) summary.setAttribute("aria-label", `Pages of: ${name}`);
  }
});

// Search fields and menus of the tables. Without scripts the forms stay hidden and the tables are whole.
document.addEventListener("DOMContentLoaded", () => {
  for (const form of document.querySelectorAll("form.dlatlas-filter")) {
    const table = document.getElementById(form.dataset.table);
    if (!table) continue;
    const rows = [...table.querySelectorAll("tbody tr:not(.dlatlas-group)")];
    const texts = rows.map((row) => row.textContent.toLowerCase());
    const field = form.querySelector("input");
    const menus = [...form.querySelectorAll("select")];
    const told = form.querySelector("output");

    const apply = () => {
      const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      rows.forEach((row, i) => {
        const fits =
          words.every((word) => texts[i].includes(word)) &&
          menus.every((menu) => !menu.value || row.dataset[menu.dataset.filter] === menu.value);
        row.hidden = !fits;
        shown += fits;
      });
      for (const body of table.tBodies) {
        const own = [...body.rows].filter((row) => !row.classList.contains("dlatlas-group"));
        body.hidden = own.length > 0 && own.every((row) => row.hidden);
      }
      table.dispatchEvent(new CustomEvent("filtered", { bubbles: true }));
      told.textContent = shown === rows.length ? `${rows.length} rows` : `${shown} of ${rows.length} rows`;
    };
    form.addEventListener("input", apply);
    form.addEventListener("submit", (event) => event.preventDefault());
    form.hidden = false;
    apply();
  }
});

// Columns of the tables that ask for it are sorted by a press on their heads; a second press turns the order round.
document.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll("table.dlatlas-sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    const body = table.tBodies[0];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const order = new Intl.Collator(undefined, { numeric: true });
        const rows = [...body.rows].sort((p, q) => order.compare(p.cells[column].textContent.trim(), q.cells[column].textContent.trim()));
        body.append(...(down ? rows.reverse() : rows));
      });
    });
  }
});
