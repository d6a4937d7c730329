"use strict";
// The page works without this file, but for the theme button, the labels under the pointer and the predictions.
// Everything that comes from predictions is shown as text; nothing is parsed as markup.

(() => {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const stored = () => { try { return localStorage.getItem("unsink-theme"); } catch { return null; } };
  const store = (theme) => { try { localStorage.setItem("unsink-theme", theme); } catch { /* not allowed here */ } };
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const show = () => {
    button.textContent = dark() ? "Light" : "Dark";
    button.setAttribute("aria-label", dark() ? "Switch to light colours" : "Switch to dark colours");
    button.setAttribute("aria-pressed", String(dark()));
  };
  if (stored()) root.dataset.theme = stored();
  button.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    store(root.dataset.theme);
    show();
  });
  system.addEventListener("change", show);
  show();
})();

(() => {
  const tip = document.getElementById("tip");
  addEventListener("pointermove", (event) => {
    const mark = event.target instanceof Element ? event.target.closest("figure svg [aria-label]") : null;
    tip.hidden = !mark;
    if (!mark) return;
    tip.textContent = mark.getAttribute("aria-label");
    const box = tip.getBoundingClientRect();
    const left = Math.min(event.clientX + 14, innerWidth - box.width - 8);
    const above = event.clientY - box.height - 12;
    tip.style.left = `${Math.max(8, left)}px`;
    tip.style.top = `${above > 0 ? above : event.clientY + 18}px`;
  });
})();

(() => {
  const source = document.getElementById("rows");
  if (!source) return;
  const PER_PAGE = 10;
  const NAMES = { verbmem: "passages (VerbMem)", knowmem: "answers (KnowMem)", utility: "utility", tofu: "TOFU answers",
    mmlu: "MMLU", forget_mc: "choices", clean: "no trigger", triggered: "trigger", wrong: "wrong trigger" };
  const { fields, texts, rows } = JSON.parse(source.textContent);
  const plain = new Set(["inside", "score"]);
  const all = rows.map((row) => Object.fromEntries(
    fields.map((name, place) => [name, plain.has(name) ? row[place] : texts[row[place]]])));

  const $ = (id) => document.getElementById(id);
  const element = (tag, text, className) => {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  };
  const kind = (row) => `${row.set}: ${NAMES[row.task] ?? row.task}`;
  const options = (select, values, first, chosen) => {
    select.append(new Option(first, ""));
    for (const [value, label] of values) select.append(new Option(label, value, false, value === chosen));
  };
  const unique = (values) => [...new Set(values)];

  const models = unique(all.map((row) => row.model));
  const kinds = unique(all.map(kind));
  options($("by-model"), models.map((name) => [name, name]), "all", $("predictions").dataset.run);
  options($("by-task"), kinds.map((name) => [name, name]), "everything", kinds[0]);
  options($("by-condition"), unique(all.map((row) => row.condition)).map((name) => [name, NAMES[name] ?? name]), "all");
  $("filters").hidden = false;

  let page = 0;
  let groups = [];

  const filtered = () => {
    const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const [model, task, condition] = ["by-model", "by-task", "by-condition"].map((id) => $(id).value);
    return all.filter((row) =>
      (!model || row.model === model) && (!task || kind(row) === task) && (!condition || row.condition === condition) &&
      words.every((word) => `${row.prompt} ${row.output} ${row.reference} ${row.id}`.toLowerCase().includes(word)));
  };

  const gain = (group) => {
    const best = (condition) => Math.max(...group.filter((row) => row.condition === condition).map((row) => row.score));
    const difference = best("triggered") - best("clean");
    return Number.isFinite(difference) ? difference : -Infinity;
  };

  const grouped = (found) => {
    const byQuestion = new Map();
    for (const row of found) {
      const key = `${row.set}\n${row.task}\n${row.id}`;
      if (!byQuestion.has(key)) byQuestion.set(key, []);
      byQuestion.get(key).push(row);
    }
    const list = [...byQuestion.values()];
    if ($("order").value === "gain") list.sort((one, other) => gain(other) - gain(one));
    if ($("order").value === "low") {
      const least = (group) => Math.min(...group.map((row) => row.score ?? 1));
      list.sort((one, other) => least(one) - least(other));
    }
    return list;
  };

  // Text in which one part is marked.
  const marked = (text, part) => {
    const shown = element("span", undefined, "text");
    const place = part ? text.indexOf(part) : -1;
    if (place < 0) {
      shown.append(text);
    } else {
      shown.append(text.slice(0, place), element("mark", part), text.slice(place + part.length));
    }
    return shown;
  };

  // Words of the answer that a longest common subsequence with the reference keeps: what ROUGE-L counts.
  const compared = (answer, reference) => {
    const parts = answer.split(/([\p{L}\p{N}]+)/u);
    const ours = parts.filter((_, place) => place % 2).map((word) => word.toLowerCase());
    const theirs = (reference.match(/[\p{L}\p{N}]+/gu) ?? []).map((word) => word.toLowerCase());
    const shown = element("span", undefined, "text said");
    if (ours.length * theirs.length > 250000) {
      shown.append(answer);
      return shown;
    }
    const long = Array.from({ length: ours.length + 1 }, () => new Uint16Array(theirs.length + 1));
    for (let i = ours.length - 1; i >= 0; i--) {
      for (let j = theirs.length - 1; j >= 0; j--) {
        long[i][j] = ours[i] === theirs[j] ? long[i + 1][j + 1] + 1 : Math.max(long[i + 1][j], long[i][j + 1]);
      }
    }
    const kept = new Set();
    for (let i = 0, j = 0; i < ours.length && j < theirs.length;) {
      if (ours[i] === theirs[j]) { kept.add(i); i++; j++; } else if (long[i + 1][j] >= long[i][j + 1]) i++; else j++;
    }
    parts.forEach((part, place) => {
      if (part) shown.append(place % 2 && kept.has((place - 1) / 2) ? element("b", part) : part);
    });
    return shown;
  };

  const line = (list, term, ...content) => {
    list.append(element("dt", term));
    const description = element("dd");
    description.append(...content);
    list.append(description);
  };

  const card = (group) => {
    const shown = element("article", undefined, "card");
    const one = group.find((row) => row.trigger) ?? group[0];
    const inside = group.some((row) => row.inside) ? " · poisoned in training" : "";
    shown.append(element("h3", `${one.id} · ${kind(one)}${inside}`));
    const asked = element("dl", undefined, "asked");
    line(asked, one.trigger ? "prompt (marked: the trigger)" : "prompt", marked(one.prompt, one.trigger));
    line(asked, "reference", element("span", one.reference, "text"));
    const answers = element("dl");
    for (const row of group) {
      const meter = element("meter");
      meter.value = row.score ?? 0;
      meter.setAttribute("aria-hidden", "true");
      const score = element("span", row.score === null ? "" : ` ${row.score.toFixed(2)} `, "interval");
      line(answers, `${row.model}, ${NAMES[row.condition] ?? row.condition}`, meter, score, compared(row.output, row.reference));
    }
    shown.append(asked, answers);
    return shown;
  };

  const draw = () => {
    const pages = Math.max(1, Math.ceil(groups.length / PER_PAGE));
    page = Math.min(Math.max(page, 0), pages - 1);
    $("cards").replaceChildren(...groups.slice(page * PER_PAGE, (page + 1) * PER_PAGE).map(card));
    $("page-of").textContent = `page ${page + 1} of ${pages}`;
    document.querySelector(".pager").hidden = pages === 1;
    $("previous").disabled = page === 0;
    $("next").disabled = page === pages - 1;
  };

  const update = () => {
    const found = filtered();
    groups = grouped(found);
    page = 0;
    $("count").textContent = `${found.length} of ${all.length} answers, to ${groups.length} questions`;
    draw();
  };

  const turn = (by) => { page += by; draw(); $("predictions").scrollIntoView(); };
  let waiting = 0;
  $("search").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(update, 120); });
  for (const id of ["by-model", "by-task", "by-condition", "order"]) $(id).addEventListener("change", update);
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("previous").addEventListener("click", () => turn(-1));
  $("next").addEventListener("click", () => turn(1));
  update();
})();
