"use strict";
// Everything that a verdict says is put on the page by textContent or setAttribute; nothing here parses HTML.
(() => {
  const $ = (id) => document.getElementById(id);
  const store = $("data");
  if (!store) return;
  const data = JSON.parse(store.textContent);
  store.remove();
  const { texts, codes, measures } = data;
  const cases = data.cases.split("\n");
  const box = $("rows"), body = $("body");
  const NAMES = ["q", "b", "r", "s", "o", "sort"];
  const OUTCOMES = { red: "failed", gone: "known, but pass now", known: "known issue", green: "passed", skipped: "skipped" };
  const GLYPHS = { red: "✗", gone: "✗", known: "~", green: "✓", skipped: "–" };
  let state = {}, view = [], active = 0, height = 32, first = -1, last = -1, here = null;

  function make(tag, name, text) {
    const node = document.createElement(tag);
    if (name) node.className = name;
    if (text !== undefined) node.textContent = text;
    return node;
  }
  const value = (x) => (typeof x === "number" ? x : Infinity);
  const shown = (x) => (typeof x !== "number" ? x : x >= 1e4 ? x.toExponential(2) : x >= 100 ? x.toFixed(0) : x.toFixed(2));
  const text = (column, i) => texts[column][codes[column][i]];
  const failed = (i) => ["red", "gone"].includes(text("outcome", i));

  // -- state in the address ------------------------------------------------------------------------------------------
  function address(change) {
    const all = { ...state, ...change }, query = new URLSearchParams();
    for (const name of [...NAMES, "v"]) if (all[name] !== undefined && all[name] !== "") query.set(name, all[name]);
    return "#" + query.toString();
  }
  function read() {
    const hash = location.hash.slice(1);
    if (hash && $(hash)) return false; // a section of this page: filters stay
    const query = new URLSearchParams(hash);
    state = {};
    for (const name of NAMES) if (query.get(name)) state[name] = query.get(name);
    const row = query.get("v");
    here = row !== null && /^\d+$/.test(row) && Number(row) < cases.length ? Number(row) : null;
    return true;
  }
  function change(values) { // typing makes no history
    for (const name in values) if (values[name] === "") delete values[name], delete state[name];
    history.replaceState(null, "", address({ ...values, v: "" }));
    Object.assign(state, values);
    filter();
  }

  // -- filters -------------------------------------------------------------------------------------------------------
  function choices(select, names, label) {
    select.append(new Option(label, ""), ...names.map(([name, shown]) => new Option(shown, name)));
  }
  const counted = (column) => {
    const counts = new Array(texts[column].length).fill(0);
    for (const code of codes[column]) counts[code]++;
    return texts[column].map((name, k) => [name, `${name} (${counts[k]})`]).sort((a, b) => (a[0] < b[0] ? -1 : 1));
  };
  function matching(column, word) {
    return texts[column].map((t) => t.toLowerCase().includes(word));
  }
  function filter() {
    const words = (state.q || "").toLowerCase().split(/\s+/).filter(Boolean);
    const found = words.map((w) => ({ w, s: matching("subject", w), n: matching("note", w), t: matching("status", w) }));
    const code = (column, name) => (name ? texts[column].indexOf(name) : null);
    const b = code("subject", state.b), r = code("recipe", state.r), s = code("status", state.s);
    const kinds = texts.outcome.map((o) => (!state.o ? true : state.o === "failures" ? o === "red" || o === "gone" : o === state.o));
    view = [];
    for (let i = 0; i < cases.length; i++) {
      if (b !== null && codes.subject[i] !== b) continue;
      if (r !== null && codes.recipe[i] !== r) continue;
      if (s !== null && codes.status[i] !== s) continue;
      if (!kinds[codes.outcome[i]]) continue;
      if (found.every((f) => cases[i].includes(f.w) || f.s[codes.subject[i]] || f.n[codes.note[i]] || f.t[codes.status[i]])) view.push(i);
    }
    order();
    for (const [id, name] of [["q", "q"], ["b", "b"], ["r", "r"], ["s", "s"]]) if ($(id).value !== (state[name] || "")) $(id).value = state[name] || "";
    $("failures").checked = state.o === "failures";
    const kind = OUTCOMES[state.o] ? `, only ${OUTCOMES[state.o]}` : "";
    $("shown").textContent = `${view.length.toLocaleString("en")} of ${cases.length.toLocaleString("en")} verdicts${kind}`;
    active = 0;
    box.scrollTop = 0;
    draw(true);
  }
  const KEYS = {
    status: (i) => text("status", i), subject: (i) => text("subject", i), case: (i) => cases[i],
    z: (i) => -ratio(i), seconds: (i) => -value(measures.seconds[i]),
  };
  function ratio(i) {
    if (!text("lane", i)) return -1;
    const worst = value(measures.worst[i]), limit = value(measures.limit[i]);
    return worst === 0 ? 0 : limit === 0 ? Infinity : worst / limit;
  }
  function order() {
    const [name, down] = [(state.sort || "").replace(/-$/, ""), (state.sort || "").endsWith("-")];
    const key = Object.hasOwn(KEYS, name) ? KEYS[name] : null;
    if (key) {
      const keys = new Map(view.map((i) => [i, key(i)]));
      view.sort((x, y) => { const a = keys.get(x), b = keys.get(y); return a < b ? -1 : a > b ? 1 : x - y; });
      if (down) view.reverse();
    }
    for (const button of document.querySelectorAll("[data-sort]")) {
      const mine = key && button.dataset.sort === name, largest = name === "z" || name === "seconds";
      if (mine) button.parentNode.setAttribute("aria-sort", down !== largest ? "descending" : "ascending");
      else button.parentNode.removeAttribute("aria-sort");
    }
  }

  // -- the table: only the rows in sight exist -------------------------------------------------------------------------
  const SPARE = 12;
  function gap(rows) {
    const row = make("tr", "gap"), cell = make("td");
    row.setAttribute("aria-hidden", "true");
    cell.colSpan = 5;
    cell.style.height = `${rows * height}px`;
    row.append(cell);
    return row;
  }
  function cell(row, name, content) {
    const td = make("td", name);
    td.setAttribute("role", "cell");
    if (content instanceof Node) td.append(content); else td.textContent = content;
    row.append(td);
  }
  function badge(i) {
    const kind = text("outcome", i), node = make("span", `badge ${kind}`), glyph = make("span", "", GLYPHS[kind] + " ");
    glyph.setAttribute("aria-hidden", "true");
    node.append(glyph, text("status", i));
    if (kind === "known" || kind === "gone") node.append(make("span", "unseen", `, ${OUTCOMES[kind]}`));
    return node;
  }
  function measured(i) {
    const lane = text("lane", i);
    if (!lane) return "";
    if (lane === "exact") return "";
    const worst = measures.worst[i];
    return `${shown(worst)} / ${shown(measures.limit[i])}`;
  }
  function passed(i) {
    const lane = text("lane", i);
    if (text("outcome", i) !== "green") return "";
    return lane === "exact" ? "every bit equal" : lane === "real" ? `mean z² ${measures.mean_z2[i]}` : lane ? "" : "no tokens: shape and dtype only";
  }
  function line(position) {
    const i = view[position], row = make("tr"), link = make("a", "mono", cases[i]);
    row.setAttribute("role", "row");
    row.setAttribute("aria-rowindex", position + 2);
    link.href = address({ v: i });
    link.title = cases[i];
    link.tabIndex = position === active ? 0 : -1;
    link.dataset.at = position;
    cell(row, "c-status", badge(i));
    cell(row, "c-subject", text("subject", i));
    cell(row, "c-case", link);
    const note = text("note", i) || passed(i);
    row.lastChild.append(make("small", "", note));
    row.lastChild.lastChild.title = note;
    cell(row, "c-z", measured(i));
    cell(row, "c-s", value(measures.seconds[i]).toFixed(2));
    return row;
  }
  function draw(afresh, everything) {
    height = parseInt(getComputedStyle(box).getPropertyValue("--row"), 10) || 32;
    const from = everything ? 0 : Math.max(0, Math.floor(box.scrollTop / height) - SPARE);
    const to = Math.min(view.length, everything || Math.ceil((box.scrollTop + (box.clientHeight || 800)) / height) + SPARE);
    if (!afresh && from === first && to === last) return;
    const focused = document.activeElement && document.activeElement.dataset ? document.activeElement.dataset.at : undefined;
    [first, last] = [from, to];
    const rows = [];
    for (let p = from; p < to; p++) rows.push(line(p));
    if (!view.length) {
      const row = make("tr"), td = make("td", "empty", "No verdict matches these filters.");
      td.colSpan = 5;
      row.append(td);
      rows.push(row);
    }
    body.replaceChildren(gap(from), ...rows, gap(view.length - to));
    box.querySelector("table").setAttribute("aria-rowcount", view.length + 1);
    if (active < from || active >= to) { const some = body.querySelector("a"); if (some) some.tabIndex = 0; }
    if (focused !== undefined) { const again = body.querySelector(`a[data-at="${focused}"]`); if (again) again.focus({ preventScroll: true }); }
  }
  function go(position) {
    const to = Math.max(0, Math.min(view.length - 1, position));
    const head = box.querySelector("thead").offsetHeight, top = to * height, room = box.clientHeight - head;
    if (top < box.scrollTop) box.scrollTop = top;
    else if (top + height > box.scrollTop + room) box.scrollTop = top + height - room;
    active = to;
    draw(true); // which gives the old row its focus back where it still exists
    const link = body.querySelector(`a[data-at="${to}"]`);
    if (link) link.focus({ preventScroll: true });
  }
  body.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || event.target.dataset.at === undefined) return;
    const at = Number(event.target.dataset.at), page = Math.max(1, Math.floor(box.clientHeight / height) - 2);
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, PageDown: at + page, PageUp: at - page, Home: 0, End: view.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    go(to);
  });
  body.addEventListener("focusin", (event) => { if (event.target.dataset.at !== undefined) active = Number(event.target.dataset.at); });
  body.addEventListener("click", (event) => { // the whole row opens it, unless somebody selects its text
    const row = event.target.closest("tr"), link = row && row.querySelector("a");
    if (link && !event.target.closest("a") && !String(getSelection())) location.hash = link.hash;
  });

  // -- one verdict -----------------------------------------------------------------------------------------------------
  function list(facts, name) {
    const dl = make("dl", name);
    for (const [key, shown] of facts) { const div = make("div"); div.append(make("dt", "", key), make("dd", "", shown)); dl.append(div); }
    return dl;
  }
  function table(heads, rows, bad) {
    const node = make("table", "plain"), head = make("tr"), wide = make("div", "wide");
    heads.forEach((h, k) => { const th = make("th", k ? "num" : "", h); th.scope = "col"; head.append(th); });
    const thead = make("thead"), tbody = make("tbody");
    thead.append(head);
    for (const row of rows) {
      const tr = make("tr");
      heads.forEach((_, k) => {
        const td = make(k ? "td" : "th", k ? "num" : "", row[k]);
        if (!k) td.scope = "row";
        if (k === 1 && bad && bad(row)) td.classList.add("bad");
        tr.append(td);
      });
      tbody.append(tr);
    }
    node.append(thead, tbody);
    wide.append(node);
    return wide;
  }
  function copy(command, button) {
    const done = (ok) => {
      button.textContent = ok ? "Copied" : "Select it";
      $("said").textContent = ok ? "Rerun line copied" : "Copying is not allowed here: select the line";
      setTimeout(() => { button.textContent = "Copy"; $("said").textContent = ""; }, 2000);
    };
    const old = () => { // where the clipboard is not for files, or not for this browser
      const area = make("textarea", "unseen");
      area.value = command;
      document.body.append(area);
      area.select();
      let ok = false;
      try { ok = document.execCommand("copy"); } catch { ok = false; }
      area.remove();
      button.focus();
      done(ok);
    };
    if (navigator.clipboard) navigator.clipboard.writeText(command).then(() => done(true), old); else old();
  }
  function finding(f, name, lead) {
    const div = make("div", name), said = make("div");
    said.append(make("b", "", f.check), lead.includes(f.text) ? "" : `: ${f.text}`);
    div.append(said);
    if (f.evidence.length) div.append(list(f.evidence, "facts tight"));
    return div;
  }
  function crumbs(i) {
    const nav = make("p", "crumbs"), at = view.indexOf(i), back = make("a", "", "← All verdicts");
    back.href = address({ v: "" });
    nav.append(back);
    for (const [shown, step] of [["Previous", -1], ["Next", 1]]) {
      if (at >= 0 && view[at + step] !== undefined) { const a = make("a", "", shown); a.href = address({ v: view[at + step] }); nav.append(a); }
    }
    if (at >= 0) nav.append(make("span", "of", `${at + 1} of ${view.length} in the list`));
    return nav;
  }
  function page(i) {
    const held = $(`d${i}`), d = held ? JSON.parse(held.textContent) : null, node = $("detail"), parts = [];
    const add = (...nodes) => parts.push(...nodes), title = make("h2", "");
    title.tabIndex = -1;
    title.append(badge(i), make("span", "", text("subject", i)));
    add(crumbs(i), title, make("p", "id mono", cases[i]));
    if (d && d.known) {
      const p = make("p", "known", `Known issue ${d.known}` + (text("outcome", i) === "gone" ? " no longer fails: its entry must go" : "") + ": ");
      if (/^https:\/\//.test(d.link)) { const a = make("a", "", d.link); a.href = d.link; a.rel = "noreferrer"; p.append(a); } else p.append(d.link);
      add(p);
    }
    if (d && d.reason) add(make("p", "lead", d.reason)); else if (text("note", i)) add(make("p", "lead", text("note", i)));
    const rerun = make("div", "rerun"), command = `moecheck repro ${cases[i]}${text("suffix", i)}`, button = make("button", "", "Copy");
    button.type = "button";
    button.addEventListener("click", () => copy(command, button));
    rerun.append(make("pre", "", command), button);
    add(make("h3", "", "Rerun"), rerun);
    if (!d) { add(short(i)); node.replaceChildren(...parts); return; }
    const left = make("div"), right = make("div"), split = make("div", "split");
    if (d.diagnosis) {
      left.append(make("h3", "", "Diagnosis"));
      const p = make("p", ""), share = typeof d.diagnosis.explained === "number" && d.diagnosis.explained > 0;
      const told = d.reason.includes(d.diagnosis.text) ? "" : `: ${d.diagnosis.text}`;
      p.append(make("b", "", d.diagnosis.kind), told, share ? `; predicts ${Math.round(100 * d.diagnosis.explained)} % of the error` : "");
      left.append(p);
      if (d.diagnosis.evidence.length) left.append(list(d.diagnosis.evidence, "facts tight"));
    }
    if (d.findings.length) left.append(make("h3", "", "Findings"), ...d.findings.map((f) => finding(f, "finding", d.reason)));
    if (d.statistics.length) left.append(make("h3", "", "Against its bounds"), table(["", "value", "bound"], d.statistics, (row) => row[3]));
    if (d.samples.length) left.append(make("h3", "", "Some bad elements"), table(["token", "column", "expected", "got", "z"], d.samples));
    if (d.output) left.append(make("h3", "", "Last output of the process"), make("pre", "", d.output));
    if (d.notes.length) left.append(make("h3", "", "Notes"), ...d.notes.map((f) => finding(f, "finding note", "")));
    if (d.picture) {
      const image = make("img", "picture");
      image.src = d.picture;
      image.alt = "Heat map of the error: tokens by columns, and experts by tiles";
      right.append(make("h3", "", "Where the error is"), image);
    }
    right.append(make("h3", "", "Case"), list(d.axes, "chips"), make("h3", "", "Environment"), list([["stage", d.stage], ["seconds", String(measures.seconds[i])], ...d.environment], "facts tight"));
    if (d.rules.length) right.append(make("h3", "", "Rules in use elsewhere"), table(["rule", "would have"], d.rules.map(([n, ok]) => [n, ok ? "accepted it" : "refused it"])));
    split.append(left, right);
    node.replaceChildren(...parts, split);
  }
  function short(i) {
    const p = make("div");
    const facts = [["seconds", String(measures.seconds[i])]];
    if (measured(i)) facts.unshift(["worst / limit", measured(i)]);
    if (passed(i)) facts.unshift(["values", passed(i)]);
    p.append(make("h3", "", "Measured"), list(facts, "chips"));
    p.append(make("p", "hint", failed(i) ? "Only the first failures have all their evidence here; this one's is in journal.jsonl." : "Everything else about it is in journal.jsonl."));
    return p;
  }

  // -- what is shown -----------------------------------------------------------------------------------------------------
  const title = document.title;
  let kept = null;
  function show() {
    const before = here;
    if (!read()) { if (before === null) return; here = null; }
    const open = here !== null;
    if (open && before === null) kept = [scrollY, box.scrollTop, active];
    document.body.classList.toggle("one", open);
    $("all").hidden = open;
    $("detail").hidden = !open;
    if (open) {
      if (!view.length) filter();
      page(here);
      document.title = `${text("status", here)} ${text("subject", here)} – ${title}`;
      scrollTo(0, 0);
      $("detail").querySelector("h2").focus();
      return;
    }
    document.title = title;
    const old = before === null ? null : kept;
    filter();
    const target = $(location.hash.slice(1));
    if (old && !target) {
      [box.scrollTop, active] = [old[1], Math.min(old[2], Math.max(0, view.length - 1))];
      draw(true);
      scrollTo(0, old[0]);
      const link = body.querySelector(`a[data-at="${active}"]`);
      if (link) link.focus({ preventScroll: true });
    } else if (target) target.scrollIntoView();
    else if (location.hash.length > 1 && started) { $("verdicts").focus({ preventScroll: true }); $("verdicts").scrollIntoView(); }
  }

  let started = false, typing = 0;
  choices($("b"), counted("subject"), "all");
  choices($("r"), counted("recipe"), "all");
  choices($("s"), counted("status"), "any");
  $("q").addEventListener("input", () => { clearTimeout(typing); typing = setTimeout(() => change({ q: $("q").value.trim() }), 100); });
  for (const id of ["b", "r", "s"]) $(id).addEventListener("change", () => change({ [id]: $(id).value }));
  $("failures").addEventListener("change", () => change({ o: $("failures").checked ? "failures" : "" }));
  $("reset").addEventListener("click", () => change({ q: "", b: "", r: "", s: "", o: "", sort: "" }));
  document.querySelector(".filters").addEventListener("submit", (event) => event.preventDefault());
  for (const button of document.querySelectorAll("[data-sort]")) button.addEventListener("click", () => {
    const name = button.dataset.sort; // up, down, as it was
    change({ sort: state.sort === name ? `${name}-` : state.sort === `${name}-` ? "" : name });
  });
  box.addEventListener("scroll", () => draw(false), { passive: true });
  addEventListener("resize", () => draw(true));
  addEventListener("beforeprint", () => draw(true, Math.min(view.length, 500)));
  addEventListener("afterprint", () => draw(true));
  addEventListener("hashchange", show);
  show();
  started = true;
  document.documentElement.dataset.ready = "yes";
})();
