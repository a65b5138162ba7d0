// What a page gains where scripts run: filters, sorted tables, a timeline to zoom into, details that open when a link
// leads to them. Without it everything is there to be read. Strangers' text is only ever compared, or set as text.
"use strict";
(() => {
  const FACETS = { device: "Device", container: "Container", strategy: "Strategy", workload: "Workload", mark: "Result" };

  function element(tag, properties = {}, ...children) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  }

  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

  // --- filters ---------------------------------------------------------------------------------------------------

  /** Narrow spaces, ligatures and capitals do not keep a word from being found. */
  const folded = (text) => text.normalize("NFKC").toLowerCase();

  /** What filters show or hide: a row, a figure, a section ... A facet of what is around it is its own, too. */
  class Item {
    constructor(place, parent) {
      this.place = place;
      this.parent = parent;
      this.isRow = place.matches("tr");
      this.facets = new Map(parent?.facets);
      for (const name of Object.keys(FACETS)) {
        if (place.dataset[name]) this.facets.set(name, place.dataset[name]);
      }
      this.children = [];
      parent?.children.push(this);
    }

    get text() {
      const own = this.place.matches("details") ? this.place.querySelector("summary") : this.place;
      return (this.lower ??= folded([...this.facets.values(), own.textContent].join(" ")));
    }

    get rows() {
      return this.isRow ? [this] : this.children.flatMap((child) => child.rows);
    }

    /** Shows or hides it, and says whether it is shown. What holds rows is shown with them. */
    filter(chosen, words) {
      const shown = this.children.map((child) => [child, child.filter(chosen, words)]);
      const withRows = shown.filter(([child]) => child.rows.length);
      const counted = withRows.length ? withRows : shown;
      const fits = counted.length
        ? counted.some(([, isShown]) => isShown)
        : words.every((word) => this.text.includes(word));
      this.isShown =
        fits && chosen.every(([name, value]) => !this.facets.has(name) || this.facets.get(name) === value);
      this.place.hidden = !this.isShown;
      return this.isShown;
    }
  }

  function itemsOf(root) {
    const selector = Object.keys(FACETS).map((name) => `[data-${name}]`).join();
    const items = new Map();
    for (const place of root.querySelectorAll(selector)) {
      items.set(place, new Item(place, items.get(place.parentElement.closest(selector))));
    }
    return [...items.values()];
  }

  class Filters {
    constructor(form, items) {
      this.roots = items.filter((item) => !item.parent);
      this.counted = items.filter((item) => item.isRow);
      this.noun = "row";
      if (!this.counted.length) {
        this.counted = items.filter((item) => !item.children.length);
        this.noun = "entry";
      }
      this.search = element("input", { type: "search", name: "q", autocomplete: "off", spellcheck: false });
      this.selects = Object.entries(FACETS)
        .map(([name, label]) => [name, label, [...new Set(items.map((item) => item.facets.get(name)))].filter(Boolean)])
        .filter(([, , values]) => values.length > 1)
        .map(([name, label, values]) => {
          const select = element("select", { name, autocomplete: "off" }, element("option", { value: "" }, "all"));
          // By number, not by text: any text is a valid name.
          select.append(...values.map((value, i) => element("option", { value: String(i + 1) }, value)));
          return { name, label, values, select };
        });
      this.status = element("p", { className: "left" });
      this.status.setAttribute("role", "status");
      const labelled = (label, field) => element("label", {}, element("span", {}, label), field);
      form.append(
        labelled("Find", this.search),
        ...this.selects.map(({ label, select }) => labelled(label, select)),
        element("button", { type: "reset" }, "Show all"),
        this.status,
      );
      form.setAttribute("aria-label", "Filters");
      form.hidden = false;
      form.addEventListener("input", () => this.changed());
      form.addEventListener("submit", (event) => event.preventDefault());
      form.addEventListener("reset", () => setTimeout(() => this.changed()));
    }

    get chosen() {
      return this.selects
        .filter(({ select }) => select.value)
        .map(({ name, values, select }) => [name, values[select.value - 1]]);
    }

    changed() {
      this.apply();
      remember();
    }

    apply() {
      const words = folded(this.search.value).split(/\s+/).filter(Boolean);
      const chosen = this.chosen;
      for (const item of this.roots) item.filter(chosen, words);
      for (const link of document.querySelectorAll("nav a")) {
        link.hidden = document.getElementById(link.hash.slice(1))?.hidden ?? false;
      }
      const all = this.counted.length;
      const left = this.counted.filter((item) => item.isShown).length;
      const noun = this.noun === "entry" ? (all === 1 ? "entry" : "entries") : all === 1 ? "row" : "rows";
      const isAll = !chosen.length && !words.length;
      this.status.textContent = isAll ? `${all} ${noun}` : `${left} of ${all} ${noun}${left ? "" : ": nothing fits"}`;
      document.documentElement.classList.toggle("filtered", !isAll);
    }

    write(state) {
      for (const [name, value] of this.chosen) state.append(name, value);
      if (this.search.value) state.append("q", this.search.value);
    }

    read(state) {
      this.search.value = state.get("q") ?? "";
      for (const { name, values, select } of this.selects) {
        select.value = String(values.indexOf(state.get(name)) + 1 || "");
      }
      this.apply();
    }
  }

  // --- tables ----------------------------------------------------------------------------------------------------

  /** A table whose headings are buttons: upwards, downwards, and as it was. What has no value stays last. */
  class Sorting {
    static #texts = new Intl.Collator("en", { numeric: true });

    constructor(table) {
      this.table = table;
      this.rows = [...table.tBodies].map((body) => [body, [...body.rows]]);
      this.headings = [...table.tHead.querySelectorAll("th[data-sort]")];
      for (const heading of this.headings) {
        const button = element("button", { type: "button" }, ...heading.childNodes);
        button.addEventListener("click", () => {
          const now = heading.getAttribute("aria-sort");
          this.sort(heading, now === "ascending" ? "descending" : now ? undefined : "ascending");
          remember();
        });
        heading.append(button);
      }
    }

    sort(heading, direction) {
      for (const other of this.headings) other.removeAttribute("aria-sort");
      if (direction) heading.setAttribute("aria-sort", direction);
      for (const [body, rows] of this.rows) body.append(...(direction ? this.#sorted(rows, heading, direction) : rows));
    }

    #sorted(rows, heading, direction) {
      const isNumber = heading.dataset.sort === "number";
      const valueOf = (row) => {
        const cell = row.cells[heading.cellIndex];
        const text = cell?.dataset.value ?? cell?.textContent.trim() ?? "";
        const number = isNumber ? Number.parseFloat(text) : text;
        return text === "" || Number.isNaN(number) ? undefined : number;
      };
      const sign = direction === "ascending" ? 1 : -1;
      const compare = isNumber ? (a, b) => a - b : Sorting.#texts.compare;
      return rows
        .map((row) => [row, valueOf(row)])
        .sort(([, a], [, b]) => {
          if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
          return sign * compare(a, b);
        })
        .map(([row]) => row);
    }

    write(state) {
      const column = this.headings.findIndex((heading) => heading.hasAttribute("aria-sort"));
      if (column >= 0) state.append("sort", `${this.table.id}:${column}:${this.headings[column].getAttribute("aria-sort")}`);
    }

    read(state) {
      const mine = state.getAll("sort").map((text) => text.split(":")).find(([id]) => id === this.table.id);
      const heading = this.headings.find((_, i) => String(i) === mine?.[1]);
      const direction = ["ascending", "descending"].find((known) => known === mine?.[2]);
      if (heading) this.sort(heading, direction);
      else if (this.headings.some((known) => known.hasAttribute("aria-sort"))) this.sort(this.headings[0]);
    }
  }

  // --- the timeline ----------------------------------------------------------------------------------------------

  const SPAN_HEIGHT = 22; // of timeline.py
  const NEAR_PX = 3; // a pointer this far from a span means it
  const SMALLEST_VIEW_US = 50;
  const STEPS_OF_TICKS = [1, 2, 5, 10];
  const HINT = "Arrow keys go from span to span and between tracks, + and − zoom. Or point, drag, and zoom with Ctrl and the wheel.";

  class Timeline {
    constructor(figure) {
      this.whole = Number(figure.dataset.time); // microseconds, as all positions across
      this.from = 0;
      this.width = this.whole;
      this.svg = figure.querySelector("svg.pipeline");
      this.inner = this.svg.querySelector("svg.spans");
      this.height = this.inner.viewBox.baseVal.height;
      this.marks = [...this.svg.querySelectorAll("[data-at]")].map((mark) => [mark, Number(mark.dataset.at)]);
      this.spans = Timeline.#spansOf(this.inner, figure.querySelector(".span-list"));
      this.current = -1;
      this.outline = document.createElementNS(this.inner.namespaceURI, "rect");
      this.outline.setAttribute("class", "chosen");
      this.inner.append(this.outline);
      this.told = element("p", { className: "told" });
      this.#frame(figure);
      this.#listen();
      this.draw();
    }

    /** In the order of their begin; the k-th box of a kind is told by the k-th line of that kind. */
    static #spansOf(inner, list) {
      const lines = new Map();
      for (const line of list.textContent.split("\n")) {
        const kind = /^\w+ ([\w-]+):/.exec(line)?.[1];
        if (!lines.has(kind)) lines.set(kind, []);
        lines.get(kind).push(line);
      }
      const spans = [];
      for (const path of inner.querySelectorAll("path.span")) {
        const kind = [...path.classList].find((name) => lines.has(name));
        const boxes = path.getAttribute("d").matchAll(/M([\d.]+) ([\d.]+)h([\d.]+)/g);
        let i = 0;
        for (const [, x, y, width] of boxes) {
          spans.push({ x: Number(x), y: Number(y), width: Number(width), text: lines.get(kind)?.[i++] ?? kind });
        }
      }
      return spans.sort((a, b) => a.x - b.x || a.y - b.y);
    }

    #frame(figure) {
      const title = figure.querySelector("figcaption").textContent.trim();
      const button = (text, label, act) => {
        const made = element("button", { type: "button", title: label }, text);
        made.setAttribute("aria-label", `${label}: ${title}`);
        made.addEventListener("click", act);
        return made;
      };
      this.zoomIn = button("+", "Zoom in", () => this.zoom(1 / 2));
      this.zoomOut = button("−", "Zoom out", () => this.zoom(2));
      this.earlier = button("←", "Earlier", () => this.show(this.from - this.width / 2));
      this.later = button("→", "Later", () => this.show(this.from + this.width / 2));
      this.reset = button("Whole", "The whole", () => this.show(0, this.whole));
      this.shown = element("span", { className: "quiet" });
      const buttons = element("div", { className: "controls" }, this.zoomIn, this.zoomOut, this.earlier, this.later, this.reset, this.shown);
      buttons.setAttribute("role", "group");
      buttons.setAttribute("aria-label", `View of ${title}`);
      // A slider from span to span: what it stands on is read aloud by whatever reads the page.
      this.view = element("div", { className: "view", tabIndex: 0 });
      this.view.setAttribute("role", "slider");
      this.view.setAttribute("aria-label", `Spans of ${title}`);
      this.view.setAttribute("aria-valuemin", "0");
      this.view.setAttribute("aria-valuemax", String(this.spans.length));
      this.view.setAttribute("aria-describedby", this.svg.querySelector("desc").id);
      this.svg.before(buttons, this.view);
      this.view.append(this.svg);
      this.view.after(this.told);
      this.#tell();
    }

    #listen() {
      const view = this.view;
      view.addEventListener("keydown", (event) => {
        const act = this.#keys[event.key];
        if (!act || event.ctrlKey || event.altKey || event.metaKey) return;
        event.preventDefault();
        act();
      });
      view.addEventListener("focus", () => this.current < 0 && view.matches(":focus-visible") && this.choose(0));
      view.addEventListener("wheel", (event) => {
        const { ctrlKey, metaKey, deltaX, deltaY } = event;
        const isSideways = Math.abs(deltaX) > Math.abs(deltaY) && this.width < this.whole;
        if (!ctrlKey && !metaKey && !isSideways) return; // the page scrolls
        event.preventDefault();
        if (isSideways) this.show(this.from + deltaX * this.#perPixel);
        else this.zoom(2 ** clamp(deltaY / 100, -1, 1), this.#time(event));
      }, { passive: false });
      view.addEventListener("pointerdown", (event) => {
        if (event.button === 0) this.drag = { x: event.clientX, from: this.from };
      });
      view.addEventListener("pointermove", (event) => {
        if (this.drag && event.buttons & 1) {
          const moved = event.clientX - this.drag.x;
          if (Math.abs(moved) > NEAR_PX) view.setPointerCapture(event.pointerId);
          this.show(this.drag.from - moved * this.#perPixel);
        } else {
          const found = this.#at(event);
          if (found >= 0) this.choose(found);
        }
      });
      view.addEventListener("pointerup", (event) => {
        const found = this.drag && Math.abs(event.clientX - this.drag.x) <= NEAR_PX ? this.#at(event) : -1;
        if (found >= 0) this.choose(found);
        this.drag = undefined;
      });
    }

    #keys = {
      ArrowRight: () => this.choose(this.current + 1),
      ArrowLeft: () => this.choose(this.current - 1),
      ArrowDown: () => this.#across(1),
      ArrowUp: () => this.#across(-1),
      Home: () => this.choose(0),
      End: () => this.choose(this.spans.length - 1),
      PageDown: () => this.show(this.from + this.width / 2),
      PageUp: () => this.show(this.from - this.width / 2),
      "+": () => this.zoom(1 / 2),
      "=": () => this.zoom(1 / 2),
      "-": () => this.zoom(2),
      0: () => this.show(0, this.whole),
    };

    get #perPixel() {
      return this.width / (this.svg.getBoundingClientRect().width || 1);
    }

    #time(event) {
      return this.from + (event.clientX - this.svg.getBoundingClientRect().left) * this.#perPixel;
    }

    /** The number of the span under a pointer, the nearest, or -1. */
    #at(event) {
      const time = this.#time(event);
      const y = event.clientY - this.svg.getBoundingClientRect().top;
      const away = (span) => Math.max(span.x - time, time - span.x - span.width, 0);
      let found = -1;
      this.spans.forEach((span, i) => {
        const isHere = span.y <= y && y <= span.y + SPAN_HEIGHT && away(span) <= NEAR_PX * this.#perPixel;
        if (isHere && (found < 0 || away(span) < away(this.spans[found]))) found = i;
      });
      return found;
    }

    /** To the nearest span of the next track above or below. */
    #across(direction) {
      if (this.current < 0) return this.choose(0);
      const { x, y } = this.spans[this.current];
      const tracks = [...new Set(this.spans.map((span) => span.y))].sort((a, b) => a - b);
      const other = tracks[tracks.indexOf(y) + direction];
      let found = -1;
      this.spans.forEach((span, i) => {
        if (span.y === other && (found < 0 || Math.abs(span.x - x) < Math.abs(this.spans[found].x - x))) found = i;
      });
      return found < 0 ? undefined : this.choose(found);
    }

    choose(index) {
      if (!this.spans.length) return;
      this.current = clamp(index, 0, this.spans.length - 1);
      const { x, y, width } = this.spans[this.current];
      for (const [name, value] of Object.entries({ x, y, width, height: SPAN_HEIGHT })) this.outline.setAttribute(name, value);
      this.#tell();
      if (x + width < this.from || x > this.from + this.width) this.show(x + width / 2 - this.width / 2);
    }

    #tell() {
      const text = this.spans[this.current]?.text;
      this.told.textContent = text ?? HINT;
      this.told.classList.toggle("hint", text === undefined);
      this.view.setAttribute("aria-valuenow", String(this.current + 1));
      this.view.setAttribute("aria-valuetext", text ?? HINT);
    }

    /** `at` keeps its place: the chosen span's, else the middle. */
    zoom(factor, at) {
      const chosen = this.spans[this.current];
      const isSeen = chosen && chosen.x + chosen.width >= this.from && chosen.x <= this.from + this.width;
      const still = at ?? (isSeen ? chosen.x + chosen.width / 2 : this.from + this.width / 2);
      const width = clamp(this.width * factor, Math.min(SMALLEST_VIEW_US, this.whole), this.whole);
      this.show(still - (still - this.from) * (width / this.width), width);
    }

    show(from, width = this.width) {
      this.width = width;
      this.from = clamp(from, 0, this.whole - width);
      this.draw();
    }

    draw() {
      this.inner.setAttribute("viewBox", `${this.from} 0 ${this.width} ${this.height}`);
      const isWhole = this.width >= this.whole;
      for (const [mark, at] of this.marks) {
        const isTime = mark.matches(".time");
        const share = (at - this.from) / this.width;
        const isSeen = share >= 0 && share <= 1 && (isWhole || !isTime);
        mark.toggleAttribute("data-away", !isSeen);
        for (const name of mark.matches("line") ? ["x1", "x2"] : ["x"]) mark.setAttribute(name, `${(share * 100).toFixed(3)}%`);
      }
      this.#drawTicks(isWhole);
      this.zoomIn.disabled = this.width <= Math.min(SMALLEST_VIEW_US, this.whole);
      this.zoomOut.disabled = this.reset.disabled = isWhole;
      this.earlier.disabled = this.from <= 0;
      this.later.disabled = this.from + this.width >= this.whole;
      const ms = (time) => (time / 1e3).toFixed(this.width < 10_000 ? 2 : 1);
      this.shown.textContent = `${ms(this.from)} to ${ms(this.from + this.width)} of ${ms(this.whole)} ms`;
    }

    /** Of a part, its own ticks instead of those of the whole. */
    #drawTicks(isWhole) {
      for (const tick of this.svg.querySelectorAll(".own")) tick.remove();
      const pattern = this.svg.querySelector("text.time");
      if (isWhole || !pattern) return;
      const power = 10 ** Math.floor(Math.log10(this.width / 5));
      const step = power * STEPS_OF_TICKS.find((times) => power * times * 5 >= this.width);
      for (let at = Math.ceil(this.from / step) * step; at <= this.from + this.width; at += step) {
        const tick = pattern.cloneNode();
        tick.removeAttribute("data-away");
        tick.classList.add("own");
        tick.setAttribute("text-anchor", "middle");
        tick.setAttribute("x", `${(((at - this.from) / this.width) * 100).toFixed(3)}%`);
        tick.textContent = `${Number((at / 1e3).toPrecision(6))} ms`;
        this.svg.append(tick);
      }
    }
  }

  // --- the address -----------------------------------------------------------------------------------------------

  const PREFIX = "#filter:"; // what else stands behind # is the id of something on the page
  const parts = [];

  /** The view can be linked to. */
  function remember() {
    const state = new URLSearchParams();
    for (const part of parts) part.write(state);
    const text = state.toString();
    try {
      history.replaceState(null, "", text ? PREFIX + text : location.pathname + location.search);
    } catch {
      // A page within another one may not: filters work all the same.
    }
  }

  function recall() {
    if (location.hash && !location.hash.startsWith(PREFIX)) return reveal(location.hash);
    const state = new URLSearchParams(location.hash.slice(PREFIX.length));
    for (const part of parts) part.read(state);
  }

  /** Opens what a link leads to, though a filter hides it. */
  function reveal(hash) {
    const target = document.getElementById(hash.slice(1));
    for (let place = target; place; place = place.parentElement) {
      place.hidden = false;
      if (place.matches("details")) place.open = true;
    }
    target?.scrollIntoView();
    target?.querySelector("summary")?.focus({ preventScroll: true });
  }

  const form = document.getElementById("filters");
  const items = itemsOf(document.querySelector("main"));
  if (form && items.length > 1) parts.push(new Filters(form, items));
  parts.push(...[...document.querySelectorAll("table.sortable")].map((table) => new Sorting(table)));
  for (const figure of document.querySelectorAll("figure[data-zoom]")) new Timeline(figure);
  for (const part of parts) part.read(new URLSearchParams());
  recall();
  addEventListener("hashchange", recall);
  document.addEventListener("click", (event) => {
    const link = event.target.closest?.('a[href^="#"]');
    if (link && link.hash === location.hash) reveal(link.hash); // no change of the address tells it
  });

  // --- what is not in view -----------------------------------------------------------------------------------------

  /** page.css leaves it out while the page opens; then it comes piece by piece, for whoever takes a picture of it all. */
  const whenIdle = globalThis.requestIdleCallback ?? ((act) => setTimeout(act, 50));
  const unseen = [...document.querySelectorAll("main.long > section")];
  function layOut() {
    unseen.shift()?.classList.add("laid-out");
    if (unseen.length) whenIdle(layOut);
  }
  addEventListener("load", () => whenIdle(layOut));
})();
