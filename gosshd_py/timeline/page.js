"use strict";
/* Draws what model.py has found; knows nothing of SSH. One connection at a time, and of it what is in
   view: marks that would cover each other become one that says how many, so a long trace stays quick. */
(() => {
  const data = JSON.parse(document.getElementById("trace").textContent);
  const SVG = "http://www.w3.org/2000/svg";
  const LABEL = 92, TOP = 36, ROW = 19, GAP = 9, NEAR = 8;
  const PAUSE = 50000; // µs; longer ones are told on the axis where time is not drawn to scale
  const byId = (id) => document.getElementById(id);
  const lanes = byId("lanes"), details = byId("details"), choice = byId("connection");
  const connections = new Map();
  let current = null, axis = null, view = [0, 1], chosen = -1, shown = new Map();

  const node = (name, attributes, text) => {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const html = (name, text, attributes = {}) => {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  };

  // -- time: from microseconds to the axis and back. Squeezed, each step has some room, and longer ones
  //    have more of it, but not in proportion: what happens in 100 µs is seen beside a pause of a minute.

  class Axis {
    constructor(connection, squeeze) {
      this.us = [0]; this.at = [0]; this.pauses = [];
      for (const [us] of connection.marks) {
        const last = this.us.length - 1, step = us - this.us[last];
        if (step <= 0) continue;
        const drawn = squeeze ? 0.4 + Math.log1p(step / 1000) : step;
        if (squeeze && step > PAUSE) this.pauses.push([this.at[last], this.at[last] + drawn, step]);
        this.us.push(us); this.at.push(this.at[last] + drawn);
      }
      this.end = Math.max(this.at[this.at.length - 1], 1);
      this.least = squeeze ? 0.5 : 20; // what is shown at once, at least
    }
    static between(from, to, value) {
      let low = 0, high = from.length - 1;
      if (high === 0 || value >= from[high]) return to[high] + Math.max(value - from[high], 0);
      while (high - low > 1) {
        const middle = (low + high) >> 1;
        if (from[middle] <= value) low = middle; else high = middle;
      }
      return to[low] + (to[high] - to[low]) * (value - from[low]) / (from[high] - from[low]);
    }
    position(us) { return Axis.between(this.us, this.at, us); }
    time(at) { return Axis.between(this.at, this.us, at); }
  }
  const spell = (us, step = us) =>
    step < 1000 ? `${us < 1000 ? Math.round(us) + " µs" : (us / 1000).toFixed(3) + " ms"}`
      : step < 1e6 ? `${(us / 1000).toFixed(step < 10000 ? 2 : 1)} ms` : `${(us / 1e6).toFixed(step < 1e7 ? 2 : 1)} s`;

  // -- drawing ---------------------------------------------------------------------------------------

  const width = () => Math.max(lanes.clientWidth, 300);
  const x = (us) => LABEL + (axis.position(us) - view[0]) / (view[1] - view[0]) * (width() - LABEL - 14);
  const tops = () => {
    let y = TOP;
    return current.lanes.map((lane) => { const top = y; y += lane.rows * ROW + 14 + GAP; return top; }).concat([y]);
  };

  function draw() {
    if (!current) return;
    const top = tops(), total = top[top.length - 1], right = width();
    lanes.setAttribute("height", total + 4);
    lanes.setAttribute("viewBox", `0 0 ${right} ${total + 4}`);
    seen = band(), drawnAt = scrollY;
    const back = node("g", {}), bars = node("g", {}), arrows = node("g", {}), marks = node("g", {}), words = node("g", {});
    current.lanes.forEach((lane, number) => {
      const y = top[number], height = top[number + 1] - y - GAP;
      if (!inBand(top, number)) return;
      if (number % 2 === 0) back.append(node("rect", {class: "stripe", x: 0, y: y - 3, width: right, height: height + 6}));
      words.append(node("text", {class: "lane", x: 8, y: y + 14}, lane.name));
      for (const bar of lane.bars) drawBar(bars, bar, y);
    });
    drawAxis(back, total);
    drawMarks(marks, top);
    drawArrows(arrows, top);
    words.prepend(node("rect", {x: 0, y: 0, width: LABEL - 4, height: total, fill: "var(--paper)", opacity: 0.82}));
    const defs = node("defs", {});
    for (const name of ["", "chosen"]) {
      const marker = node("marker", {id: `head${name}`, class: name, viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 6, markerHeight: 6, orient: "auto"});
      marker.append(node("path", {d: "M0 0 8 4 0 8z"}));
      defs.append(marker);
    }
    lanes.replaceChildren(defs, back, bars, arrows, words, marks);
  }

  // Of a thousand lanes only those near the window are drawn, and drawn anew when it moves.
  let seen = [0, Infinity], drawnAt = 0, printing = false;
  function band() {
    if (printing) return [0, Infinity];
    const above = -lanes.getBoundingClientRect().top;
    return [above - innerHeight, above + 2 * innerHeight];
  }
  const inBand = (top, lane) => top[lane + 1] >= seen[0] && top[lane] <= seen[1];
  addEventListener("scroll", () => { if (Math.abs(scrollY - drawnAt) > innerHeight / 2) draw(); }, {passive: true});

  function drawBar(into, [begin, end, label, state, row], y) {
    const from = Math.max(x(begin), LABEL), to = Math.min(end === null ? x(current.end) + 14 : x(end), width());
    if (to < LABEL || from > width()) return;
    const box = {class: `bar ${state}`, x: from, y: y + row * ROW, width: Math.max(to - from, 1.5), height: ROW - 4, rx: 2};
    const rect = node("rect", box);
    rect.append(node("title", {}, `${label}: ${end === null ? "still" : spell(end - begin)}`));
    into.append(rect);
    const room = Math.floor((to - from - 6) / 6.2);
    if (room > 2) into.append(node("text", {x: from + 4, y: y + row * ROW + 11.5}, label.length <= room ? label : label.slice(0, room - 1) + "…"));
  }

  function drawAxis(into, total) {
    const from = axis.time(view[0]), to = axis.time(view[1]), ticks = Math.max(2, Math.floor((width() - LABEL) / 110));
    for (let tick = 0; tick <= ticks; tick++) {
      const at = view[0] + (view[1] - view[0]) * tick / ticks, us = axis.time(at), position = x(us);
      into.append(node("line", {class: "grid", x1: position, x2: position, y1: 18, y2: total}));
      if (tick < ticks) into.append(node("text", {class: "axis", x: position + 3, y: 13}, spell(us, Math.max((to - from) / ticks, 1))));
    }
    for (const [begin, end, step] of axis.pauses) {
      const left = x(axis.time(begin)), right = x(axis.time(end));
      if (right - left < 30 || right < LABEL || left > width()) continue;
      into.append(node("line", {class: "pause", x1: (left + right) / 2, x2: (left + right) / 2, y1: 18, y2: total}));
      into.append(node("text", {class: "axis", x: (left + right) / 2 + 3, y: 27}, `⋯ ${spell(step)}`));
    }
  }

  const BAD = /\.(refused|failed|rejected|hit)$/, DATA = /^(data|window|input|output)\./;
  const markY = (top, lane) => top[lane] + current.lanes[lane].rows * ROW + 4;

  function drawMarks(into, top) {
    shown = new Map();
    const latest = new Map(); // of each lane: [x, node, numbers]
    current.marks.forEach(([us, lane, event], number) => {
      const position = x(us);
      if (position < LABEL - 4 || position > width() + 4 || !inBand(top, lane)) return;
      const before = latest.get(lane);
      if (before && position - before.x < NEAR && number !== chosen && !before.numbers.includes(chosen)) {
        before.numbers.push(number); shown.set(number, before); return;
      }
      const group = {x: position, y: markY(top, lane), lane, numbers: [number], event};
      if (before) before.next = position;
      latest.set(lane, group); shown.set(number, group);
    });
    for (const group of new Set(shown.values())) {
      const {x: cx, y: cy, numbers, event} = group, many = numbers.length > 1;
      const kind = [many ? "" : BAD.test(event) ? "bad" : DATA.test(event) ? "data" : "", numbers.includes(chosen) ? "chosen" : ""].join(" ");
      const mark = many
        ? node("rect", {class: `mark ${kind}`, x: cx - 3, y: cy - 4, width: 8, height: 8, rx: 2})
        : node("circle", {class: `mark ${kind}`, cx, cy, r: numbers.includes(chosen) ? 5.5 : 4});
      mark.dataset.numbers = numbers.join(" ");
      mark.append(node("title", {}, many ? `${numbers.length} events, from ${event}` : event));
      into.append(mark);
      if (many) into.append(node("text", {class: "many", x: cx + 1, y: cy + 14}, numbers.length));
      else if ((group.next || width()) - cx > event.length * 5.6 + 16) into.append(node("text", {class: "name", x: cx + 7, y: cy + 3.5}, event));
    }
  }

  function drawArrows(into) {
    const MOST = 400; // of each kind, in view; of more, some all along
    const mine = ([cause, effect]) => cause === chosen || effect === chosen;
    const long = ([cause, effect]) => {
      const from = shown.get(cause), to = shown.get(effect);
      return from && to && from !== to && (cause === chosen || effect === chosen || Math.abs(from.x - to.x) + Math.abs(from.y - to.y) >= 12);
    };
    const counts = {};
    for (const arrow of current.arrows.filter(long)) (counts[arrow[2]] ||= []).push(arrow);
    const some = Object.values(counts).flatMap((all) => all.filter((arrow, number) => mine(arrow) || number % Math.ceil(all.length / MOST) === 0));
    for (const [cause, effect, kind] of some) {
      const from = shown.get(cause), to = shown.get(effect), isMine = mine([cause, effect]);
      const bend = Math.max(14, Math.min(60, Math.abs(to.x - from.x) / 2));
      const path = `M${from.x} ${from.y}C${from.x + bend} ${from.y} ${to.x - bend} ${to.y} ${to.x} ${to.y}`;
      into.append(node("path", {class: `arrow ${kind} ${isMine ? "chosen" : ""}`, d: path, "marker-end": `url(#head${isMine ? "chosen" : ""})`}));
    }
  }

  // -- details -----------------------------------------------------------------------------------------

  const RFC = /RFC (\d+)(?: §([\d.]+))?/, MAN = /^([\w-]+)\((\d)\)/;
  function source(text) {
    const rfc = RFC.exec(text), man = MAN.exec(text);
    const href = rfc ? `https://www.rfc-editor.org/rfc/rfc${rfc[1]}${rfc[2] ? "#section-" + rfc[2] : ""}`
      : man ? `https://man7.org/linux/man-pages/man${man[2]}/${man[1]}.${man[2]}.html` : null;
    return href ? html("a", text, {href, rel: "noreferrer", target: "_blank"}) : html("span", text);
  }
  const fact = (value) => typeof value === "object" && value !== null
    ? Array.isArray(value) ? value.map(fact).join(" ") : Object.entries(value).map(([k, v]) => `${k}=${fact(v)}`).join(" ")
    : String(value);
  const meaning = (event) => data.events[event] || ["This version does not know this event.", ""];

  function choose(number, move = true) {
    chosen = number;
    if (number < 0) { draw(); return; }
    const [us, lane, event, facts] = current.marks[number], [gloss, from] = meaning(event);
    if (move) {
      const at = axis.position(us), span = view[1] - view[0];
      if (at < view[0] || at > view[1]) view = [at - span / 2, at + span / 2];
    }
    const list = html("dl");
    for (const [name, value] of Object.entries(facts)) list.append(html("dt", name), html("dd", fact(value)));
    const rows = [html("h2", event), html("p", `${spell(us)} after the start, ${current.lanes[lane].name}`, {class: "when"}), html("p", gloss), list];
    if (from) { const line = html("p", "see "); line.append(source(from)); rows.push(line); }
    for (const [word, mine, other] of [["cause", 1, 0], ["effect", 0, 1]]) {
      for (const arrow of current.arrows.filter((found) => found[mine] === number).slice(0, 5)) {
        const line = html("p", `${word}: `), button = html("button", current.marks[arrow[other]][2]);
        button.addEventListener("click", () => choose(arrow[other]));
        line.append(button); rows.push(line);
      }
    }
    details.replaceChildren(...rows);
    draw();
    if (!inView(number)) { seen = [0, Infinity]; scrollTo({top: scrollY + lanes.getBoundingClientRect().top + markY(tops(), lane) - innerHeight / 3}); draw(); }
  }

  function inView(number) {
    const y = lanes.getBoundingClientRect().top + markY(tops(), current.marks[number][1]);
    const below = matchMedia("(max-width: 800px)").matches ? innerHeight * 0.55 : innerHeight; // the details lie there
    return y > 0 && y < below - 10;
  }

  const ROWS = 1000;
  function fillList(most = ROWS) {
    if (!byId("list").open || !current) return;
    const table = html("table");
    table.innerHTML = "<thead><tr><th>time</th><th>lane</th><th>event</th><th>facts</th><th>what it means</th></tr></thead>";
    const body = table.createTBody();
    for (const [us, lane, event, facts] of current.marks.slice(0, most)) {
      const row = body.insertRow();
      for (const text of [spell(us), current.lanes[lane].name, event, Object.entries(facts).map(([k, v]) => `${k} ${fact(v)}`).join(", "), meaning(event)[0]])
        row.insertCell().textContent = text;
    }
    byId("list").lastElementChild.replaceChildren(table);
    if (current.marks.length > most) {
      const more = html("button", `show all ${current.marks.length}`);
      more.addEventListener("click", () => fillList(Infinity));
      byId("list").lastElementChild.append(more);
    }
  }

  // -- moving about ------------------------------------------------------------------------------------

  function clampView() {
    const span = Math.min(Math.max(view[1] - view[0], axis.least), axis.end * 1.05), slack = span * 0.2;
    const begin = Math.min(Math.max(view[0], -slack), axis.end - span + slack);
    view = [begin, begin + span];
  }
  function middle() { // of the picture, or where the chosen event is: that shall stay in view
    const at = chosen < 0 ? -1 : x(current.marks[chosen][0]);
    return at >= LABEL && at <= width() ? at : (width() + LABEL) / 2;
  }
  function zoom(factor, pixel = middle()) {
    const share = (pixel - LABEL) / (width() - LABEL - 14), at = view[0] + (view[1] - view[0]) * share;
    const span = (view[1] - view[0]) * factor;
    view = [at - span * share, at + span * (1 - share)];
    clampView(); draw();
  }
  function pan(pixels) {
    const by = pixels / (width() - LABEL - 14) * (view[1] - view[0]);
    view = [view[0] - by, view[1] - by];
    clampView(); draw();
  }
  function fit() { view = [0, axis.end]; draw(); }
  function step(by) {
    if (!current.marks.length) return;
    choose(chosen < 0 ? (by > 0 ? 0 : current.marks.length - 1) : Math.min(Math.max(chosen + by, 0), current.marks.length - 1));
  }
  function otherLane(by) {
    if (chosen < 0) return step(1);
    const [us, lane] = current.marks[chosen];
    for (let next = lane + by; next >= 0 && next < current.lanes.length; next += by) {
      let best = -1;
      current.marks.forEach(([at, of], number) => {
        if (of === next && (best < 0 || Math.abs(at - us) < Math.abs(current.marks[best][0] - us))) best = number;
      });
      if (best >= 0) return choose(best);
    }
  }

  const keys = {
    ArrowRight: () => step(1), ArrowLeft: () => step(-1), ArrowUp: () => otherLane(-1), ArrowDown: () => otherLane(1),
    "+": () => zoom(0.6), "=": () => zoom(0.6), "-": () => zoom(1.7), "0": fit, Home: () => choose(0), End: () => choose(current.marks.length - 1),
    g: () => { byId("squeeze").click(); }, Escape: () => choose(-1),
  };
  lanes.addEventListener("keydown", (event) => {
    if (keys[event.key] && current && !event.ctrlKey && !event.metaKey) { keys[event.key](); event.preventDefault(); }
  });
  lanes.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.shiftKey && !event.deltaX && document.documentElement.scrollHeight > innerHeight + 40) return; // scroll
    event.preventDefault();
    if (event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY)) pan(-(event.deltaX || event.deltaY));
    else zoom(event.deltaY > 0 ? 1.25 : 0.8, event.clientX - lanes.getBoundingClientRect().left);
  }, {passive: false});

  const fingers = new Map();
  let moved = 0;
  lanes.addEventListener("pointerdown", (event) => { fingers.set(event.pointerId, event.clientX); moved = 0; });
  lanes.addEventListener("pointermove", (event) => {
    if (!fingers.has(event.pointerId)) return;
    const before = [...fingers.values()], was = fingers.get(event.pointerId);
    fingers.set(event.pointerId, event.clientX);
    moved += Math.abs(event.clientX - was);
    if (fingers.size === 1) { if (moved > 4) pan(event.clientX - was); return; }
    const after = [...fingers.values()], left = lanes.getBoundingClientRect().left;
    const apart = (pair) => Math.max(Math.abs(pair[0] - pair[1]), 10);
    zoom(apart(before) / apart(after), (after[0] + after[1]) / 2 - left);
  });
  for (const name of ["pointerup", "pointercancel", "pointerleave"]) lanes.addEventListener(name, (event) => fingers.delete(event.pointerId));
  lanes.addEventListener("click", (event) => {
    if (moved > 4 || !event.target.dataset.numbers) return;
    const numbers = event.target.dataset.numbers.split(" ").map(Number);
    if (numbers.length > 1) {
      const first = axis.position(current.marks[numbers[0]][0]), last = axis.position(current.marks[numbers[numbers.length - 1]][0]);
      const span = Math.max(last - first, axis.least);
      view = [first - span * 0.3, last + span * 0.3];
      clampView();
    }
    choose(numbers[0], false);
  });

  // -- which connection ----------------------------------------------------------------------------------

  function show(key, keep = false) {
    const old = current;
    current = connections.get(key);
    if (!current) return;
    const atEnd = old !== current && keep && old && axis && view[1] >= axis.end * 0.99;
    axis = new Axis(current, byId("squeeze").checked);
    if (!keep) { chosen = -1; view = [0, axis.end]; } else if (atEnd) view = [Math.min(view[0], axis.end - 1), axis.end];
    choice.value = key;
    byId("name").textContent = current.label;
    draw(); fillList();
  }
  function take(connection) {
    const isNew = !connections.has(connection.key);
    connections.set(connection.key, connection);
    let option = [...choice.options].find((found) => found.value === connection.key);
    if (!option) { option = html("option"); option.value = connection.key; choice.append(option); }
    option.textContent = `${connection.label}${connection.open ? " …" : ""}`;
    return isNew;
  }
  function note(dropped) {
    byId("note").textContent = dropped ? `${dropped} events were not written: the trace has gaps` : connections.size ? "" : "nothing has happened yet";
  }

  choice.addEventListener("change", () => show(choice.value));
  byId("squeeze").addEventListener("change", () => { axis = new Axis(current, byId("squeeze").checked); fit(); });
  byId("in").addEventListener("click", () => zoom(0.6));
  byId("out").addEventListener("click", () => zoom(1.7));
  byId("fit").addEventListener("click", fit);
  byId("list").addEventListener("toggle", () => fillList());
  addEventListener("resize", draw);
  addEventListener("beforeprint", () => { printing = true; draw(); byId("list").open = true; fillList(2000); });
  addEventListener("afterprint", () => { printing = false; draw(); });
  for (const [name, words] of [["open", "open"], ["handshake", "handshake"], ["running", "running"], ["draining", "input or program ended"], ["closing", "hanging up, closing"], ["descriptor", "a descriptor"], ["waiting", "somebody has to wait"]]) {
    const entry = html("span"), box = html("i", "", {style: `background: var(--${{draining: "ended", closing: "leaving"}[name] || name})`});
    entry.append(box, words); byId("legend").append(entry);
  }
  for (const words of ["● an event", "■ several at nearly the same time: as many as below; click to see them apart", "→ cause and effect", "⇢ (dashed) data on its way"]) byId("legend").append(html("span", words));

  data.connections.forEach(take);
  note(data.dropped);
  if (data.connections.length) show(data.connections[data.connections.length - 1].key);
  if (data.follow) {
    byId("newest").hidden = false;
    const live = new EventSource(data.follow);
    live.addEventListener("message", (message) => {
      const news = JSON.parse(message.data);
      let newest = null;
      for (const connection of news.connections) { if (take(connection)) newest = connection.key; }
      note(news.dropped);
      if (newest && byId("follow").checked) show(newest);
      else if (current && news.connections.some((found) => found.key === current.key)) show(current.key, true);
      else if (!current && news.connections.length) show(news.connections[0].key);
    });
    live.addEventListener("error", () => { byId("note").textContent = "the server has gone; this is what was there"; });
  }
  document.documentElement.dataset.ready = String(Math.round(performance.now()));
})();
