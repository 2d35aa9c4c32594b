"use strict";
(() => {
  const byId = (id) => document.getElementById(id);

  // --- the mosaic: the sheet is moved and enlarged inside the viewer
  const viewer = byId("viewer"), sheet = byId("sheet"), target = byId("target");
  const full = { width: +viewer.dataset.width, height: +viewer.dataset.height };
  const most = 24;
  let zoom = 1, left = 0, top_ = 0;

  const size = () => ({ width: sheet.offsetWidth, height: sheet.offsetWidth * full.height / full.width });
  const least = () => Math.min(1, viewer.clientHeight / size().height) || 1;
  const inside = (offset, room, length) => length < room ? (room - length) / 2 : Math.min(0, Math.max(room - length, offset));

  function show() {
    const { width, height } = size();
    if (!width || !viewer.clientHeight) return;  // not laid out, as while printing
    left = inside(left, viewer.clientWidth, width * zoom);
    top_ = inside(top_, viewer.clientHeight, height * zoom);
    sheet.style.transform = `translate(${left}px, ${top_}px) scale(${zoom})`;
    target.setAttribute("r", full.width * 22 / (size().width * zoom));
    viewer.dataset.zoom = zoom.toFixed(3);
  }
  function zoomAt(factor, x, y) {
    const next = Math.min(most, Math.max(least(), zoom * factor));
    left = x - (x - left) * next / zoom;
    top_ = y - (y - top_) * next / zoom;
    zoom = next;
    show();
  }
  function whole() { zoom = least(); left = top_ = 0; target.setAttribute("hidden", ""); show(); }
  function goTo(x, y) {
    const scale = size().width / full.width, row = full.height - 1 - y;
    zoom = Math.min(most, Math.max(2.5, 1 / scale));
    left = viewer.clientWidth / 2 - x * scale * zoom;
    top_ = viewer.clientHeight / 2 - row * scale * zoom;
    target.setAttribute("cx", x);
    target.setAttribute("cy", row);
    target.removeAttribute("hidden");
    show();
  }
  const middle = (factor) => zoomAt(factor, viewer.clientWidth / 2, viewer.clientHeight / 2);
  const actions = { in: () => middle(1.6), out: () => middle(1 / 1.6), whole };
  for (const button of document.querySelectorAll("[data-do]")) button.onclick = actions[button.dataset.do];
  for (const button of document.querySelectorAll("[data-over]")) button.onclick = () => {
    const on = byId(button.dataset.over).toggleAttribute("hidden") === false;
    button.setAttribute("aria-pressed", on);
  };
  for (const link of document.querySelectorAll(".goto")) link.addEventListener("click", () => goTo(+link.dataset.x, +link.dataset.y));
  viewer.addEventListener("wheel", (event) => {
    event.preventDefault();
    const box = viewer.getBoundingClientRect();
    zoomAt(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0015)), event.clientX - box.left, event.clientY - box.top);
  }, { passive: false });
  viewer.addEventListener("dblclick", whole);
  viewer.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60] }[event.key];
    if (step) { left += step[0]; top_ += step[1]; show(); }
    else if (event.key === "+") actions.in();
    else if (event.key === "-") actions.out();
    else if (event.key === "0") whole();
    else return;
    event.preventDefault();
  });
  const fingers = new Map();
  const spread = ([a, b]) => Math.hypot(a.x - b.x, a.y - b.y);
  viewer.addEventListener("pointerdown", (event) => {
    fingers.set(event.pointerId, { x: event.clientX, y: event.clientY });
    viewer.setPointerCapture(event.pointerId);
  });
  viewer.addEventListener("pointermove", (event) => {
    const finger = fingers.get(event.pointerId);
    if (!finger) return;
    const before = [...fingers.values()].map((f) => ({ ...f }));
    left += (event.clientX - finger.x) / fingers.size;
    top_ += (event.clientY - finger.y) / fingers.size;
    finger.x = event.clientX;
    finger.y = event.clientY;
    if (fingers.size === 2) {
      const now = [...fingers.values()], box = viewer.getBoundingClientRect();
      zoomAt(spread(now) / Math.max(1, spread(before)), (now[0].x + now[1].x) / 2 - box.left, (now[0].y + now[1].y) / 2 - box.top);
    } else show();
  });
  for (const end of ["pointerup", "pointercancel"]) viewer.addEventListener(end, (event) => fingers.delete(event.pointerId));
  window.addEventListener("resize", show);
  whole();

  // --- the ledger: rows are arrays; only one page of them is in the document
  const { columns, rows, words, decimal } = JSON.parse(byId("ledger-data").textContent);
  const perPage = 100, table = byId("ledger-table"), head = table.tHead.rows[0], body = table.tBodies[0];
  const at = Object.fromEntries(columns.map((column, i) => [column.key, i]));
  const searched = columns.flatMap((column, i) => column.text && column.key !== "status" ? [i] : []);
  const haystack = new Map(rows.map((row) => [row, searched.map((i) => row[i]).join("\n").toLowerCase()]));
  const compare = new Intl.Collator(document.documentElement.lang, { numeric: true }).compare;
  let order = 0, falling = false, page = 0, chosen = rows;

  const cell = (value) => Array.isArray(value) ? value.map(cell).join("  ")
    : value === null ? "" : typeof value === "number" ? String(value).replace(".", decimal) : value;
  const first = (value) => Array.isArray(value) ? value[0] ?? null : value === "" ? null : value;

  function choose() {
    const text = byId("ledger-filter").value.trim().toLowerCase(), status = byId("ledger-status").value;
    chosen = rows.filter((row) => (status === "all" || row[at.status] === status) && haystack.get(row).includes(text));
    const sign = falling ? -1 : 1;
    chosen.sort((a, b) => {
      const x = first(a[order]), y = first(b[order]);
      if (x === null || y === null) return (x === null) - (y === null);  // what is unknown comes last, both ways
      return sign * (typeof x === "number" ? x - y : compare(x, y));
    });
    page = 0;
    fill();
  }
  function fill() {
    const from = page * perPage, to = Math.min(chosen.length, from + perPage);
    body.replaceChildren(...chosen.slice(from, to).map((row) => {
      const line = document.createElement("tr");
      line.className = row[at.status];
      row.forEach((value, i) => {
        const box = line.insertCell();
        box.textContent = columns[i].key === "status" ? words[value] : cell(value);
        if (columns[i].text) { box.className = "text"; box.title = box.textContent; }
      });
      return line;
    }));
    byId("ledger-page").textContent = chosen.length
      ? words.page.replace("{from}", from + 1).replace("{to}", to).replace("{of}", chosen.length) : words.none;
    byId("ledger-previous").disabled = page === 0;
    byId("ledger-next").disabled = to >= chosen.length;
    [...head.cells].forEach((box, i) => {
      box.textContent = columns[i].title + (i === order ? (falling ? " ▾" : " ▴") : "");
      box.setAttribute("aria-sort", i !== order ? "none" : falling ? "descending" : "ascending");
    });
  }
  columns.forEach((column, i) => {
    const box = document.createElement("th");
    if (column.text) box.className = "text";
    box.tabIndex = 0;
    box.onclick = () => { falling = i === order && !falling; order = i; choose(); };
    box.onkeydown = (event) => { if (event.key === "Enter") box.click(); };
    head.append(box);
  });
  byId("ledger-filter").oninput = byId("ledger-status").onchange = choose;
  byId("ledger-previous").onclick = () => { page -= 1; fill(); };
  byId("ledger-next").onclick = () => { page += 1; fill(); };
  choose();
})();
