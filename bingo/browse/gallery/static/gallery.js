// The page: a state that lives in the address (so that back, reload and links work), the anchors that it selects, and one bag.
// Names of files and classes reach the page through textContent and setAttribute alone, never as HTML.
"use strict";

(() => {
  const PAGE = 60;
  const { info, column } = bingo.store;
  const at = (id) => document.getElementById(id);
  const SORTS = [
    ...(column.sample ? [["sample", "A sample, by row", null, 1]] : []),
    ["row", "Row", null, 1],
    ["purity-low", "Purity, lowest first", "purity", 1],
    ["purity-high", "Purity, highest first", "purity", -1],
    ["similarity-low", "Similarity, lowest first", "similarity", 1],
    ["similarity-high", "Similarity, highest first", "similarity", -1],
    ["hubs", "In most bags (hubs)", "in_bags", -1],
    ["orphans", "In fewest bags (orphans)", "in_bags", 1],
  ];
  const ROWWISE = ["row", "sample"];
  const EMPTY = { row: null, sort: SORTS[0][0], label: null, cluster: null, q: "", page: 0 };
  let state = { ...EMPTY };
  let rows = new Int32Array(0); // the anchors that are selected, in order
  let selected = null; // the part of the state that `rows` was made for
  let drawn = null; // the page of them that is drawn
  let shown = 0; // counts bags, so that a slow one does not replace a later one
  let search = 0;
  let focusMembers = false;

  const number = (value) => value.toLocaleString("en");
  const percent = (value) => (value === null ? "unknown" : `${Math.round(100 * value)} %`);
  const labelled = info.classes.length > 0; // otherwise nothing is said of classes
  const className = (label) => (label < 0 ? "unknown" : info.classes[label]);
  const classText = (label) => (label < 0 ? "no label" : `class ${info.classes[label]}`);
  const withClass = (text, label) => (labelled ? `${text}, ${classText(label)}` : text);
  const say = (text) => { at("status").textContent = text; };

  function element(tag, className, text) {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  }

  // ---- the address

  function readAddress() {
    const given = new URLSearchParams(location.hash.slice(1));
    const whole = (name, end) => {
      const value = Number(given.get(name) ?? NaN);
      return Number.isInteger(value) && value >= 0 && value < end ? value : null;
    };
    return {
      row: whole("row", info.rows),
      sort: SORTS.some(([name]) => name === given.get("sort")) ? given.get("sort") : EMPTY.sort,
      label: whole("class", info.classes.length),
      cluster: column.cluster ? whole("cluster", 2 ** 31) : null,
      q: given.get("q") ?? "",
      page: whole("page", Math.ceil(info.rows / PAGE)) ?? 0,
    };
  }

  // From the address, not from `state`, which follows it a moment later: two quick changes must both count.
  function go(changes) {
    const next = { ...readAddress(), ...changes };
    const names = { row: "row", sort: "sort", label: "class", cluster: "cluster", q: "q", page: "page" };
    const address = new URLSearchParams();
    for (const [key, name] of Object.entries(names)) if (next[key] !== EMPTY[key]) address.set(name, next[key]);
    const hash = `#${address}`;
    if (hash === (location.hash || "#")) render();
    else location.hash = hash;
  }

  // ---- which anchors, in which order

  async function select() {
    const key = JSON.stringify([state.sort, state.label, state.cluster, state.q]);
    if (key === selected) return true;
    const turn = ++search;
    const found = await matches(turn);
    if (found === null) return false;
    rows = sorted(found);
    selected = key;
    return true;
  }

  // The rows that class, cluster and text leave over, in order; null where another search has begun.
  async function matches(turn) {
    if (state.sort === "sample" && !state.q && state.label === null && state.cluster === null) return column.sample;
    const kept = new Int32Array(info.rows);
    let count = 0;
    const text = state.q.toLowerCase();
    const fits = info.classes.map((name) => name.toLowerCase().includes(text));
    for (let start = 0; start < info.rows; start += info.path_rows) {
      const end = Math.min(start + info.path_rows, info.rows);
      const paths = text ? await bingo.block("paths", start / info.path_rows) : null;
      if (turn !== search) return null;
      if (text && start % (16 * info.path_rows) === 0) at("count").textContent = `searching, ${percent(start / info.rows)}`;
      for (let row = start; row < end; row++) {
        const label = column.label[row];
        if (state.label !== null && label !== state.label) continue;
        if (state.cluster !== null && column.cluster[row] !== state.cluster) continue;
        if (paths && !(label >= 0 && fits[label]) && !paths[row - start].toLowerCase().includes(text)) continue;
        kept[count++] = row;
      }
    }
    return kept.subarray(0, count);
  }

  // By the sort's column, then by row; what is unknown comes last. Key and row share one number, so that the sort is a native one.
  function sorted(found) {
    const [, , name, sign] = SORTS.find(([id]) => id === state.sort);
    if (!name) return found;
    const keys = new Float64Array(found.length);
    for (let i = 0; i < found.length; i++) {
      const value = column[name][found[i]];
      const unknown = name !== "in_bags" && value === info.unknown;
      keys[i] = (unknown ? 2 ** 22 : sign * value) * info.rows + found[i];
    }
    keys.sort();
    return Int32Array.from(keys, (key) => ((key % info.rows) + info.rows) % info.rows);
  }

  // ---- drawing

  // Where the thumbnail of a row is among those of the sheets, -1 if it has none.
  function place(row) {
    const among = column.thumbnails;
    if (!among) return row;
    let [low, high] = [0, among.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (among[middle] < row) low = middle + 1;
      else high = middle;
    }
    return among[low] === row ? low : -1;
  }

  function thumb(row, node) {
    const { px, suffix, columns, tiles } = info.sprites;
    const [found, count] = [place(row), (column.thumbnails ?? column.label).length];
    node.dataset.row = row;
    node.classList.toggle("pixels", px <= 48);
    if (found < 0) {
      Object.assign(node.style, { backgroundImage: "", backgroundSize: "contain", backgroundPosition: "center" });
      if (info.files) bingo.path(row).then((path) => {
        if (Number(node.dataset.row) !== row) return;
        node.style.backgroundImage = `url("${info.files}/${path.split("/").map(encodeURIComponent).join("/")}")`;
      }, () => {});
      return node;
    }
    const sheet = Math.floor(found / tiles);
    const inside = found % tiles;
    const lines = Math.ceil(Math.min(tiles, count - sheet * tiles) / columns);
    const step = (index, steps) => (steps > 1 ? `${(100 * index) / (steps - 1)}%` : "0%");
    node.style.backgroundImage = `url("thumbnails/s${String(sheet).padStart(6, "0")}.${suffix}")`;
    node.style.backgroundSize = `${100 * columns}% ${100 * lines}%`;
    node.style.backgroundPosition = `${step(inside % columns, columns)} ${step(Math.floor(inside / columns), lines)}`;
    return node;
  }

  function tile(row, name, lines, kind) {
    const item = element("li");
    const button = element("button", `tile ${kind ?? ""}`);
    button.type = "button";
    button.tabIndex = -1;
    button.dataset.row = row;
    button.setAttribute("aria-label", name);
    button.append(thumb(row, element("span", "thumb")));
    if (kind) button.append(element("span", "mark", kind === "same" ? "✓" : "✗"));
    lines.forEach((line, i) => button.append(element("span", i ? "line faint" : "line", line)));
    button.addEventListener("click", (event) => {
      // opened from the keyboard, or a member that will be replaced: go on among the members
      focusMembers = event.detail === 0 || button.closest("#members") !== null;
      go({ row });
    });
    button.addEventListener("focus", () => rove(button));
    bingo.path(row).then((path) => {
      button.title = path;
      if (!labelled && lines[1] === "") button.querySelector(".faint").textContent = path.split("/").pop();
    }, () => {});
    item.append(button);
    return item;
  }

  // One tile of a list can be reached by the tab key; arrows move within the list.
  function rove(button) {
    for (const other of button.closest("ul").querySelectorAll("button")) other.tabIndex = other === button ? 0 : -1;
  }

  function figure(row) {
    if (state.sort.startsWith("purity")) return `purity ${percent(bingo.share("purity", row))}`;
    if (state.sort.startsWith("similarity")) return `cosine ${bingo.share("similarity", row)?.toFixed(3) ?? "unknown"}`;
    if (!ROWWISE.includes(state.sort)) return `in ${number(column.in_bags[row])} bags`;
    return column.label[row] < 0 ? "" : classText(column.label[row]);
  }

  function anchorName(row) {
    const words = [withClass(`row ${row}`, column.label[row])];
    if (!ROWWISE.includes(state.sort)) words.push(figure(row));
    return words.join(", ");
  }

  // Tiles are replaced only when there are others to show, so that the focus stays where it is.
  function renderAnchors(current) {
    const pages = Math.max(1, Math.ceil(rows.length / PAGE));
    const page = Math.min(state.page, pages - 1);
    const where = state.cluster === null ? "" : ` in cluster ${state.cluster}`;
    at("count").textContent = `${rows.length === info.rows ? "all" : `${number(rows.length)} of`} ${number(info.rows)}${where}`;
    at("page").textContent = `page ${number(page + 1)} of ${number(pages)}`;
    at("previous").disabled = page === 0;
    at("next").disabled = page === pages - 1;
    const list = at("anchors");
    const key = `${selected} ${page}`;
    if (key !== drawn) {
      drawn = key;
      const focused = list.contains(document.activeElement);
      const part = rows.subarray(page * PAGE, (page + 1) * PAGE);
      list.replaceChildren(...Array.from(part, (row) => tile(row, anchorName(row), [`row ${row}`, figure(row)])));
      if (!part.length) list.append(element("li", "", "No anchor matches."));
      if (window.scrollY > at("results").offsetTop) window.scrollTo(0, 0);
      if (focused) (list.querySelector("button") ?? at("results")).focus();
    }
    for (const button of list.querySelectorAll("button")) {
      if (Number(button.dataset.row) === current) button.setAttribute("aria-current", "true");
      else button.removeAttribute("aria-current");
    }
    const entry = list.querySelector('[tabindex="0"]') ?? list.querySelector('[aria-current="true"]') ?? list.querySelector("button");
    if (entry) entry.tabIndex = 0;
  }

  function term(list, name, value) {
    list.append(element("dt", "", name), element("dd", "", value));
  }

  async function renderBag(row) {
    const turn = ++shown;
    const [members, path] = await Promise.all([bingo.bag(row), bingo.path(row)]);
    if (turn !== shown) return;
    const label = column.label[row];
    const known = label >= 0 && members.some((member) => column.label[member.row] >= 0);
    const same = members.filter((member) => column.label[member.row] === label).length;
    at("bag-title").textContent = `Bag of row ${row}`;
    at("bag-path").textContent = path;
    thumb(row, at("anchor-thumb")).setAttribute("aria-label", `row ${row}: ${path}`);
    const list = at("bag-figures");
    list.replaceChildren();
    if (labelled) term(list, "Class", className(label));
    if (known) term(list, "Purity", `${percent(bingo.share("purity", row))} (${same} of ${members.length} of its class)`);
    term(list, "Similarity", members.length ? `${bingo.share("similarity", row).toFixed(3)} on average` : "none");
    term(list, "Hubness", `in ${number(column.in_bags[row])} bags`);
    at("members-title").textContent = members.length ? `${members.length} members, nearest first` : "The bag is empty";
    at("members").replaceChildren(...members.map((member, i) => memberTile(member, i, label)));
    const first = at("members").querySelector("button");
    if (first) first.tabIndex = 0;
    if (focusMembers && first) first.focus();
    focusMembers = false;
    renderCluster(row);
    say(`${withClass(`Bag of row ${row}`, label)}${known ? `: ${same} of ${members.length} members of its class` : ""}`);
  }

  function memberTile(member, i, anchorLabel) {
    const label = column.label[member.row];
    const kind = anchorLabel < 0 || label < 0 ? undefined : label === anchorLabel ? "same" : "other";
    const words = { same: ", the same class", other: ", another class" }[kind] ?? "";
    const cosine = member.similarity.toFixed(3);
    const name = withClass(`member ${i + 1}: row ${member.row}, similarity ${cosine}`, label) + words;
    const lines = [`row ${member.row}`, `cosine ${cosine}`];
    if (label >= 0) lines.push(classText(label));
    return tile(member.row, name, lines, kind);
  }

  function renderCluster(row) {
    const button = at("cluster");
    button.hidden = !column.cluster || info.method === "label";
    if (button.hidden) return;
    button.textContent = `All rows of cluster ${column.cluster[row]}`;
    button.onclick = () => go({ ...EMPTY, row, sort: state.sort, cluster: column.cluster[row] });
  }

  async function render() {
    state = readAddress();
    at("problem").textContent = "";
    at("search").value = state.q;
    at("class").value = state.label ?? "";
    at("sort").value = state.sort;
    try {
      if (!(await select())) return;
      const row = state.row ?? (rows.length ? rows[0] : null);
      renderAnchors(row);
      if (row !== null) await renderBag(row);
    } catch (error) {
      at("problem").textContent = error.message;
    }
  }

  // ---- what people do

  function find(event) {
    event.preventDefault();
    const text = at("search").value.trim();
    if (!/^\d+$/.test(text)) {
      go({ q: text, page: 0, row: null });
      say("Searching");
    } else if (Number(text) < info.rows) {
      go({ row: Number(text), q: "" });
    } else {
      at("problem").textContent = `Row ${text}: there are bags for rows 0 to ${info.rows - 1}.`;
    }
  }

  function turn(pages) {
    const last = Math.max(0, Math.ceil(rows.length / PAGE) - 1);
    go({ page: Math.max(0, Math.min(last, readAddress().page + pages)) });
  }

  // The tile that an arrow leads to: one to the side, or the one above or below, by where they are drawn.
  function neighbour(button, key) {
    const tiles = [...button.closest("ul").querySelectorAll("button")];
    const place = tiles.indexOf(button);
    const columns = tiles.filter((other) => other.offsetTop === tiles[0].offsetTop).length;
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, Home: -place, End: tiles.length - 1 - place }[key];
    return tiles[place + step];
  }

  function pressed(event) {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const typing = event.target.matches("input, select");
    const onTile = event.target.closest?.(".tile");
    if (event.key === "/" && !typing) {
      at("search").focus();
      at("search").select();
    } else if (event.key === "Escape") {
      (at("anchors").querySelector('[aria-current="true"]') ?? at("anchors").querySelector("button") ?? at("results")).focus();
    } else if (onTile && (event.key.startsWith("Arrow") || event.key === "Home" || event.key === "End")) {
      neighbour(onTile, event.key)?.focus();
    } else if (event.key === "PageDown" && !typing && !at("next").disabled) {
      turn(1);
    } else if (event.key === "PageUp" && !typing && !at("previous").disabled) {
      turn(-1);
    } else {
      return;
    }
    event.preventDefault();
  }

  function start() {
    document.title = `Bags: ${info.title}`;
    at("title").textContent = info.title;
    at("figures").textContent = info.figures;
    at("class").append(new Option("all", ""), ...info.classes.map((name, label) => new Option(name, label)));
    at("class").closest("label").hidden = !labelled;
    if (!labelled) at("search").placeholder = "a row number, or part of a path";
    at("sort").append(...SORTS.filter(([name]) => labelled || !name.startsWith("purity")).map(([name, text]) => new Option(text, name)));
    at("class").addEventListener("change", (event) => go({ label: event.target.value === "" ? null : Number(event.target.value), page: 0, row: null }));
    at("sort").addEventListener("change", (event) => go({ sort: event.target.value, page: 0 }));
    at("controls").addEventListener("submit", find);
    at("reset").addEventListener("click", () => go({ ...EMPTY, row: readAddress().row }));
    at("previous").addEventListener("click", () => turn(-1));
    at("next").addEventListener("click", () => turn(1));
    document.querySelector(".skip").addEventListener("click", (event) => {
      event.preventDefault();
      at("results").focus();
    });
    document.addEventListener("keydown", pressed);
    window.addEventListener("hashchange", render);
    render();
  }

  start();
})();
