// The map of the field: what a point stands for, its relations, the arrow keys, and the search that it shares with its table.
document.addEventListener("DOMContentLoaded", () => {
  const map = document.querySelector(".dlatlas-map");
  if (!map) return;
  const svg = map.querySelector("svg");
  const edges = svg.querySelector(".dlatlas-map-edges");
  const told = map.querySelector(".dlatlas-map-told");
  const tools = map.querySelector(".dlatlas-map-tools");
  const papers = JSON.parse(map.querySelector(".dlatlas-map-data").textContent);
  const dots = new Map([...svg.querySelectorAll(".dlatlas-dot")].map((dot) => [dot.dataset.key, dot]));
  const places = new Map([...dots].map(([key, dot]) => [key, middle(dot)]));
  let chosen = null;

  function middle(dot) {
    const box = dot.firstElementChild.getBBox();
    return { x: box.x + box.width / 2, y: box.y + box.height / 2 };
  }

  const element = (name, text, css) => {
    const made = document.createElement(name);
    if (text) made.textContent = text;
    if (css) made.className = css;
    return made;
  };

  // Keys of the papers that stand in this relation to the chosen one.
  const related = {
    builds: (key) => Object.keys(papers).filter((other) => papers[key].builds?.includes(other) || papers[other].builds?.includes(key)),
    parts: (key) => Object.keys(papers).filter((other) => other !== key && papers[other].parts?.some((part) => papers[key].parts?.includes(part))),
    chapter: (key) => Object.keys(papers).filter((other) => other !== key && papers[other].chapter === papers[key].chapter),
  };

  const draw = () => {
    edges.replaceChildren();
    if (!chosen) return;
    const from = places.get(chosen);
    for (const box of tools.querySelectorAll("input:checked")) {
      for (const other of related[box.dataset.edges](chosen)) {
        const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
        const to = places.get(other);
        for (const [name, value] of [["x1", from.x], ["y1", from.y], ["x2", to.x], ["y2", to.y]]) line.setAttribute(name, value);
        line.setAttribute("class", `dlatlas-edge-${box.dataset.edges}`);
        edges.append(line);
      }
    }
  };

  const names = (keys) => keys.map((key) => papers[key].method).join(", ");

  const choose = (key) => {
    if (key === chosen) return;
    dots.get(chosen)?.classList.remove("dlatlas-chosen");
    chosen = key;
    const dot = dots.get(key);
    dot.classList.add("dlatlas-chosen");
    for (const other of dots.values()) other.tabIndex = other === dot ? 0 : -1;
    const paper = papers[key];
    const heading = element("p", "", "dlatlas-paper-title");
    const way = element("a", paper.method);
    way.href = dot.getAttribute("href");
    heading.append(way);
    const lines = [heading, element("p", paper.title)];
    if (paper.does) lines.push(element("p", paper.does));
    lines.push(element("p", paper.claims ?? dot.getAttribute("aria-label").match(/\(([^()]*)\)$/)[1], "dlatlas-small"));
    if (paper.builds) lines.push(element("p", `Builds on: ${names(paper.builds)}`, "dlatlas-small"));
    told.replaceChildren(...lines);
    draw();
  };

  const shown = () => [...dots].filter(([, dot]) => !dot.classList.contains("dlatlas-faint"));

  // The nearest shown point to a place of the screen, within a thumb's width.
  const nearest = (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const reach = 22 / svg.getScreenCTM().a;
    const [best] = shown().map(([key]) => [Math.hypot(places.get(key).x - at.x, places.get(key).y - at.y), key]).sort((p, q) => p[0] - q[0]);
    return best && best[0] <= reach ? best[1] : null;
  };

  svg.addEventListener("pointermove", (event) => {
    const key = event.pointerType === "touch" ? null : nearest(event);
    if (key) choose(key);
  });
  // A tap chooses, a second tap on the same point opens; a click with a mouse opens what it points at.
  // What was chosen before the tap counts: the tap itself moves the focus.
  let tapped = null;
  svg.addEventListener("pointerdown", (event) => { tapped = event.pointerType === "touch" ? { before: chosen } : null; });
  svg.addEventListener("click", (event) => {
    if (event.detail === 0) return; // Enter on a point: the browser follows its link
    const key = nearest(event);
    event.preventDefault();
    if (!key) return;
    if (tapped && key !== tapped.before) choose(key);
    else dots.get(key).dispatchEvent(new MouseEvent("click", { detail: 0, ctrlKey: event.ctrlKey, metaKey: event.metaKey, bubbles: true, cancelable: true }));
  });
  svg.addEventListener("focusin", (event) => {
    const dot = event.target.closest(".dlatlas-dot");
    if (dot) choose(dot.dataset.key);
  });

  const ways = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] };
  svg.addEventListener("keydown", (event) => {
    const way = ways[event.key];
    const dot = event.target.closest(".dlatlas-dot");
    if (!way || !dot) return;
    event.preventDefault();
    const from = places.get(dot.dataset.key);
    let best = null;
    for (const [key, other] of shown()) {
      const [dx, dy] = [places.get(key).x - from.x, places.get(key).y - from.y];
      const along = dx * way[0] + dy * way[1];
      const aside = Math.abs(dx * way[1]) + Math.abs(dy * way[0]);
      if (along > 0.1 && (!best || along + 2 * aside < best[0])) best = [along + 2 * aside, other];
    }
    best?.[1].focus();
  });

  tools.addEventListener("input", draw);
  document.getElementById("map-table").addEventListener("filtered", (event) => {
    for (const row of event.target.querySelectorAll("tbody tr")) dots.get(row.dataset.key).classList.toggle("dlatlas-faint", row.hidden);
    const left = shown();
    if (left.length === 1) choose(left[0][0]);
    // The keyboard needs one point to begin with.
    else if (left.length && !left.some(([key]) => key === chosen)) for (const [key, dot] of dots) dot.tabIndex = key === left[0][0] ? 0 : -1;
  });
  for (const [i, dot] of [...dots.values()].entries()) dot.tabIndex = i ? -1 : 0;
  tools.hidden = false;
});
