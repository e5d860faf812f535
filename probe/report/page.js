"use strict";
// Sorts tables, switches the theme, and draws the gallery and the map from the JSON elements of the page. Text is only
// ever set as text, never as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const n = data.id.length;
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const make = (tag, text, name) => {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (name) element.className = name;
  return element;
};

// ---------------------------------------------------------------------------------------------------------------- theme
const theme = document.getElementById("theme");
// Controls stay hidden until the script that serves them runs.
const reveal = (...elements) => elements.forEach((element) => { element.hidden = false; });
const prefersDark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (document.documentElement.dataset.theme ?? (prefersDark.matches ? "dark" : "light")) === "dark";
let redraw = () => {}; // the map, where there is one
const themed = () => {
  theme.textContent = isDark() ? "Light" : "Dark";
  theme.setAttribute("aria-label", `Switch to the ${isDark() ? "light" : "dark"} theme`);
  redraw();
};
reveal(theme);
theme.addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  themed();
});
prefersDark.addEventListener("change", themed);
// Print in light colours. A canvas keeps the colours that it was drawn in, so it is drawn again. The style sheet opens
// what belongs on paper (`.paper`); older browsers need it open.
let screenTheme;
let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details.paper:not([open])")];
  opened.forEach((one) => { one.open = true; });
  screenTheme = document.documentElement.dataset.theme;
  document.documentElement.dataset.theme = "light";
  themed();
});
addEventListener("afterprint", () => {
  opened.forEach((one) => { one.open = false; });
  if (screenTheme) document.documentElement.dataset.theme = screenTheme;
  else delete document.documentElement.dataset.theme;
  themed();
});

// -------------------------------------------------------------------------------------------------------------- folding
const folds = [...document.querySelectorAll("details")];
const foldAll = document.getElementById("fold");
const isAnyClosed = () => folds.some((one) => !one.open);
const named = () => { foldAll.textContent = isAnyClosed() ? "Open all" : "Fold all"; };
reveal(foldAll);
foldAll.addEventListener("click", () => {
  const open = isAnyClosed();
  folds.forEach((one) => { one.open = open; });
});
folds.forEach((one) => one.addEventListener("toggle", named));
// Whoever follows a link to a section wants to see what is in it.
const openNamed = (hash) => document.querySelector(`main > section${CSS.escape(hash).replace("\\#", "#")} > details`)?.setAttribute("open", "");
document.querySelectorAll("nav a").forEach((link) => link.addEventListener("click", () => openNamed(link.hash)));
if (location.hash) openNamed(location.hash);

// -------------------------------------------------------------------------------------------------------------- sorting
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
  headings.forEach((heading, column) => {
    const button = make("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    heading.classList.add("sorts");
    heading.addEventListener("click", () => { // the whole cell: the button's own click arrives here too
      const descending = heading.getAttribute("aria-sort") !== "descending";
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const key = (row) => {
        const cell = row.cells[column];
        const value = cell.dataset.value;
        return value === undefined ? cell.textContent.trim() : value === "" || value === "nan" ? null : Number(value);
      };
      const compare = (a, b) => {
        if (a === null || b === null) return (a === null) - (b === null); // what is missing stands last either way
        return (descending ? -1 : 1) * (typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b);
      };
      const rows = [...table.tBodies[0].rows].sort((a, b) => compare(key(a), key(b)));
      table.tBodies[0].append(...rows);
    });
  });
}

// ----------------------------------------------------------------------------------------------------------- thumbnails
const { size, side, sheets, picture } = JSON.parse(document.getElementById("thumbnails").textContent);
const decoded = new Map(); // sheet number to a promise of its image
const sheetOf = (number) => {
  if (!decoded.has(number)) {
    const image = new Image();
    image.src = `data:image/webp;base64,${sheets[number]}`;
    decoded.set(number, image.decode().then(() => image));
  }
  return decoded.get(number);
};
// A canvas of a patch, which is drawn once its sheet has been decoded.
const canvasOf = (row, scale) => {
  const canvas = make("canvas");
  canvas.width = canvas.height = Math.max(size, 1) * scale;
  const number = picture[row];
  if (number < 0) return canvas;
  sheetOf(Math.floor(number / (side * side))).then((image) => {
    const inSheet = number % (side * side);
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(image, (inSheet % side) * size, Math.floor(inSheet / side) * size, size, size, 0, 0, canvas.width, canvas.height);
  });
  return canvas;
};

// Patches on which a run says otherwise than the raters: pictures of those that the gallery has.
const rowOf = new Map(data.id.map((id, row) => [`${data.set[row]} ${id}`, row]));
for (const list of document.querySelectorAll(".dissents")) {
  list.closest("details").addEventListener("toggle", () => {
    for (const item of list.children) {
      const row = rowOf.get(`${list.dataset.set} ${item.dataset.id}`);
      if (row !== undefined && picture[row] >= 0) item.prepend(canvasOf(row, 1));
    }
  }, { once: true });
}

// -------------------------------------------------------------------------------------------------------------- patches
// Of two classes the data hold the probability of class 1, beside thresholds; of more the class that is said, its
// probability, and that of the label.
const many = data.names.length > 2;
const votesOf = (row) => [...data.votes[data.vote[row]]].filter((vote) => vote !== "-");
const votesFor = (votes, k) => votes.filter((vote) => vote === data.letters[k]).length;
const dissent = (row) => {
  const votes = votesOf(row);
  const most = Math.max(...data.names.map((_, k) => votesFor(votes, k)));
  return votes.length < 2 ? 0 : (votes.length - most) / votes.length;
};
const thresholdOf = (run, row) => data.thresholds[run][data.set[row]];
const has = (run, row) => data.probability[run][row] !== null;
const predicted = (run, row) => (many ? data.predicted[run][row] : Number(data.probability[run][row] >= thresholdOf(run, row)));
const outcome = (run, row) => {
  if (!has(run, row)) return "none";
  const said = predicted(run, row);
  if (said === data.label[row]) return "right";
  return many ? "wrong" : said === 1 ? "alarm" : "missed";
};
const outcomeText = (run, row) => {
  const is = outcome(run, row);
  if (many && is !== "none") return `${is === "right" ? "✓" : "✗"} said ${data.names[predicted(run, row)]}`;
  return { right: "✓ correct", missed: `✗ missed ${data.names[1]}`, alarm: `✗ false ${data.names[1]}`, none: "not scored" }[is];
};
// How far beyond the threshold a mistake lies, as a share of the way to certainty; below zero where the run is right.
// Of more classes: how much more probable than the label the run holds what it says.
const wrongness = (run, row) => {
  if (!has(run, row)) return -2;
  const p = data.probability[run][row];
  if (many) return outcome(run, row) === "right" ? -p : p - data.probability_of_label[run][row];
  const t = thresholdOf(run, row);
  const beyond = p >= t ? (p - t) / Math.max(1 - t, 1e-9) : (t - p) / Math.max(t, 1e-9);
  return outcome(run, row) === "right" ? -beyond : beyond;
};
const spread = (row) => {
  const scores = data.runs.map((_, run) => (many ? data.probability_of_label : data.probability)[run][row]).filter((p) => p !== null);
  return scores.length < 2 ? 0 : Math.max(...scores) - Math.min(...scores);
};
const describe = (row, run) => {
  const lines = [`label ${data.names[data.label[row]]}`];
  if (many && run !== undefined && outcome(run, row) === "wrong") lines[0] += `, probability ${data.probability_of_label[run][row].toFixed(3)}`;
  const votes = votesOf(row);
  if (votes.length && !many) lines[0] += `, votes ${votesFor(votes, 1)}/${votes.length}`;
  const given = many ? data.names.map((name, k) => [name, votesFor(votes, k)]).filter(([, times]) => times) : [];
  if (given.length) lines.push(`votes ${given.map(([name, times]) => `${name} ${times}`).join(", ")}`);
  const from = [data.groups[data.group[row]], data.domains[data.domain[row]]].filter(Boolean);
  if (from.length) lines.push(from.join(", "));
  return lines;
};
const scoresOf = (row) => data.runs.map((run, k) => (has(k, row) ? `${run}${many ? ` said ${data.names[predicted(k, row)]}` : ""} ${data.probability[k][row].toFixed(3)}` : "")).filter(Boolean);

// -------------------------------------------------------------------------------------------------------------- gallery
const PAGE = 48;
const filters = document.getElementById("filters");
reveal(filters);
const tiles = document.getElementById("tiles");
const count = document.getElementById("count");
const more = document.getElementById("more");
let found = [];
let shown = 0;

data.domains.map((name, k) => [name, k]).filter(([name]) => name).sort().forEach(([name, k]) => {
  filters.elements.domain.append(new Option(name, k));
});
for (const [name, empty] of [["domain", data.domains.every((d) => !d)], ["agreement", data.votes.every((v) => v.length < 2)]]) {
  filters.elements[name].disabled = empty;
}

const tileOf = (row, run) => {
  const is = outcome(run, row);
  const tile = make("figure", undefined, `tile ${is === "right" || is === "none" ? is : "wrong"}`);
  const canvas = canvasOf(row, 1);
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `Patch ${data.id[row]}`);
  const caption = make("figcaption");
  const p = data.probability[run][row];
  caption.append(make("div", `${outcomeText(run, row)}${p === null ? "" : ` ${p.toFixed(3)}`}`, "outcome"));
  for (const line of describe(row, run)) caption.append(make("div", line));
  caption.append(make("div", data.id[row], "ends"), make("div", data.sets[data.set[row]].title, "ends"));
  tile.title = [data.id[row], ...scoresOf(row)].join("\n");
  tile.append(canvas, caption);
  return tile;
};

const showMore = () => {
  const run = Number(filters.elements.run.value);
  const next = found.slice(shown, shown + PAGE);
  tiles.append(...next.map((row) => tileOf(row, run)));
  shown += next.length;
  more.hidden = shown >= found.length;
  more.textContent = `Show ${Math.min(PAGE, found.length - shown)} more`;
  count.textContent = `${shown.toLocaleString("en")} of ${found.length.toLocaleString("en")} patches`;
};

const filter = () => {
  const wanted = Object.fromEntries(new FormData(filters));
  const run = Number(wanted.run);
  const text = (wanted.search ?? "").trim().toLowerCase();
  found = [];
  for (let row = 0; row < n; row += 1) {
    const is = outcome(run, row);
    if (wanted.set ? data.set[row] !== Number(wanted.set) : data.sets[data.set[row]].validation && data.sets.length > 1) continue;
    if (wanted.label && data.label[row] !== Number(wanted.label)) continue;
    if (wanted.predicted && !(has(run, row) && predicted(run, row) === Number(wanted.predicted))) continue;
    if (wanted.outcome === "wrong" ? is === "right" || is === "none" : wanted.outcome && is !== wanted.outcome) continue;
    if (wanted.agreement === "disputed" && dissent(row) === 0) continue;
    if (wanted.agreement === "unanimous" && (dissent(row) > 0 || votesOf(row).length < 2)) continue;
    if (wanted.domain && data.domain[row] !== Number(wanted.domain)) continue;
    if (text && !`${data.id[row]} ${data.groups[data.group[row]]}`.toLowerCase().includes(text)) continue;
    found.push(row);
  }
  const keys = {
    wrong: (row) => wrongness(run, row), disputed: (row) => dissent(row) + wrongness(run, row) / 100, differ: spread,
    high: (row) => data.probability[run][row] ?? -1, low: (row) => -(data.probability[run][row] ?? 2),
  };
  const key = new Map(found.map((row) => [row, keys[wanted.order](row)]));
  found.sort((a, b) => key.get(b) - key.get(a) || a - b);
  shown = 0;
  tiles.replaceChildren();
  showMore();
  offerSlides();
};

// Points of the patches that were found, as GeoJSON that QuPath imports by drag and drop: a file belongs onto one slide.
// They are annotations, which QuPath draws at every zoom, and whose class can be changed.
const save = document.getElementById("save");
const offerSlides = () => {
  if (!save) return;
  const { slide } = save.elements;
  const before = slide.value;
  const counts = new Map();
  for (const row of found) if (data.place[row]) counts.set(data.place[row][0], (counts.get(data.place[row][0]) ?? 0) + 1);
  const most = [...counts].sort((a, b) => b[1] - a[1] || a[0] - b[0]);
  slide.replaceChildren(...most.map(([k, times]) => new Option(`${data.slides[k]} (${times.toLocaleString("en")})`, k)));
  if (before !== "" && counts.has(Number(before))) slide.value = before;
  save.hidden = !most.length;
};
const featureOf = (row, run) => {
  const [slide, x, y] = data.place[row];
  const said = has(run, row) ? predicted(run, row) : data.label[row];
  const measured = has(run, row) ? { [`Probability ${data.names[many ? said : 1]}`]: data.probability[run][row] } : {};
  return {
    type: "Feature",
    id: data.id[row],
    geometry: { type: "Point", coordinates: [x, y] },
    properties: {
      objectType: "annotation",
      name: data.id[row],
      classification: { name: data.names[said], color: data.colors[said] },
      measurements: measured,
      metadata: { slide: data.slides[slide], "annotated class": data.names[data.label[row]], run: data.runs[run] },
    },
  };
};
save?.elements.save.addEventListener("click", () => {
  const slide = Number(save.elements.slide.value);
  const run = Number(filters.elements.run.value);
  const features = found.filter((row) => data.place[row]?.[0] === slide).map((row) => featureOf(row, run));
  const link = make("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify({ type: "FeatureCollection", features })], { type: "application/geo+json" }));
  link.download = `${data.slides[slide].replaceAll(/[\\/]/g, "-")}.geojson`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
});

filters.addEventListener("input", filter);
more.addEventListener("click", () => {
  const first = tiles.children.length;
  showMore();
  tiles.children[first]?.scrollIntoView({ block: "nearest" });
});
filter();

// ------------------------------------------------------------------------------------------------------------------ map
const canvas = document.getElementById("canvas");
if (canvas) {
  const controls = document.getElementById("map-controls");
  const point = document.getElementById("point");
  const legend = document.getElementById("map-legend");
  const chosen = controls.elements;
  const context = canvas.getContext("2d");
  const MARGIN = 14;
  const HINT = "Point at a patch.";
  reveal(controls, canvas.parentElement);
  point.textContent = HINT;
  let places = []; // [row, x, y] of every drawn patch
  let current = -1; // index into places

  const fillAxes = () => {
    const map = data.maps[Number(chosen.map.value)];
    for (const [k, select] of [chosen.x, chosen.y].entries()) {
      const names = map.explained.map((share, component) => `component ${component + 1} (${(100 * share).toFixed(1)} %)`);
      select.replaceChildren(...names.map((name, component) => new Option(name, component)));
      select.value = Math.min(k, map.explained.length - 1);
    }
  };

  // Shape says the same as colour, so that the map reads without it. What is no number is drawn as a letter.
  const draw = (to, shape, x, y, colour) => {
    to.beginPath();
    if (typeof shape === "string") {
      to.font = "bold 11px monospace"; // tells l from I
      to.textAlign = "center";
      to.textBaseline = "middle";
      to.fillStyle = colour;
      to.fillText(shape, x, y);
      return;
    }
    if (shape === 0) to.arc(x, y, 3.2, 0, 2 * Math.PI);
    else if (shape === 1) { to.moveTo(x, y - 4.2); to.lineTo(x + 4, y + 3.2); to.lineTo(x - 4, y + 3.2); to.closePath(); }
    else if (shape === 2) to.rect(x - 3, y - 3, 6, 6);
    else if (shape === 4) { to.moveTo(x, y - 4.6); to.lineTo(x + 4.6, y); to.lineTo(x, y + 4.6); to.lineTo(x - 4.6, y); to.closePath(); }
    else if (shape === 5) { to.moveTo(x, y + 4.2); to.lineTo(x + 4, y - 3.2); to.lineTo(x - 4, y - 3.2); to.closePath(); }
    else if (shape === 6) { to.moveTo(x - 4.4, y); to.lineTo(x + 4.4, y); to.moveTo(x, y - 4.4); to.lineTo(x, y + 4.4); }
    else if (shape === 7) to.arc(x, y, 3.6, 0, 2 * Math.PI);
    else if (shape === 8) to.rect(x - 3.2, y - 3.2, 6.4, 6.4);
    else if (shape === 9) { to.moveTo(x, y - 4.6); to.lineTo(x + 4.2, y + 3.4); to.lineTo(x - 4.2, y + 3.4); to.closePath(); }
    else { to.moveTo(x - 3.4, y - 3.4); to.lineTo(x + 3.4, y + 3.4); to.moveTo(x + 3.4, y - 3.4); to.lineTo(x - 3.4, y + 3.4); }
    if (shape === 3 || shape > 5) { to.strokeStyle = colour; to.lineWidth = 1.6; to.stroke(); }
    else { to.fillStyle = colour; to.fill(); }
  };

  // Each class has a mark of its own: the first ten shapes in colours that differ for colour-blind eyes too, then letters
  // in colours that need not.
  const SHAPES = 10;
  const markOf = (k) => (k < SHAPES
    ? [k, css(`--c${k}`)]
    : [data.letters[k], `hsl(${Math.round(137.5 * k) % 360} 65% ${isDark() ? 70 : 34}%)`]);
  let highlighted = null; // the entry of the legend that was chosen

  // How each patch looks: its entry in the legend, which is a text, a shape and a colour; none for what is left out there.
  const looks = () => {
    const run = Number(chosen.run.value);
    const shade = (p) => `hsl(${220 - 195 * p} 75% ${isDark() ? 62 : 45}%)`;
    const none = ["", 3, css("--rule")];
    const [negative, positive] = data.names;
    const right = ["correct", 0, css("--soft")];
    const missed = [`missed ${positive}`, 1, css("--s1")];
    const alarm = [`false ${positive}`, 2, css("--s4")];
    const labels = many ? data.names.map((name, k) => [name, ...markOf(k)]) : [[negative, 0, css("--s0")], [positive, 1, css("--s1")]];
    const wrong = ["wrong", 1, css("--s1")];
    const sets = data.sets.map((set, k) => [set.title, k % 4, css(`--s${k % 8}`)]);
    const shades = [[`${negative}, probability 0`, 0, 0], ["probability 0.5", 0, 0.5], [`${positive}, probability 1`, 1, 1]];
    return {
      label: { legend: labels, of: (row) => labels[data.label[row]] },
      predicted: { legend: labels, of: (row) => (has(run, row) ? labels[predicted(run, row)] : none) },
      outcome: {
        legend: many ? [right, wrong] : [right, missed, alarm],
        of: (row) => ({ right, missed, alarm, wrong, none })[outcome(run, row)],
      },
      probability: {
        legend: shades.map(([text, shape, p]) => [text, shape, shade(p)]),
        of: (row) => (has(run, row) ? ["", data.label[row], shade(data.probability[run][row])] : none),
      },
      set: { legend: sets, of: (row) => sets[data.set[row]] },
    }[chosen.colour.value];
  };

  redraw = () => {
    const ratio = window.devicePixelRatio || 1;
    const [width, height] = [760, 520];
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    const components = data.maps[Number(chosen.map.value)].components;
    const [xs, ys] = [components[Number(chosen.x.value)], components[Number(chosen.y.value)]];
    const only = chosen.set.value;
    const look = looks();
    const choosable = many && ["label", "predicted"].includes(chosen.colour.value);
    const faint = (text) => choosable && highlighted !== null && text !== data.names[highlighted];
    places = [];
    const drawn = [];
    for (let row = 0; row < n; row += 1) {
      if (xs[row] === null || (only && data.set[row] !== Number(only))) continue;
      const x = MARGIN + (xs[row] / 1000) * (width - 2 * MARGIN);
      const y = height - MARGIN - (ys[row] / 1000) * (height - 2 * MARGIN);
      places.push([row, x, y]);
      const [text, shape, colour] = look.of(row);
      drawn.push([shape, colour, x, y, faint(text)]);
    }
    // Discs, the common case, below the other shapes; what was chosen in the legend above all.
    const layer = (shape) => (typeof shape === "string" ? SHAPES : shape);
    drawn.sort((a, b) => b[4] - a[4] || layer(a[0]) - layer(b[0]));
    for (const [shape, colour, x, y, isFaint] of drawn) {
      context.globalAlpha = isFaint ? 0.12 : 0.7;
      draw(context, shape, x, y, colour);
    }
    context.globalAlpha = 1;
    const focused = document.activeElement?.closest("#map-legend button")?.dataset.entry;
    legend.classList.toggle("choosable", choosable);
    legend.replaceChildren(...look.legend.map(([text, shape, colour], entry) => {
      const item = make("li");
      const sign = make("canvas");
      sign.width = sign.height = 14;
      draw(sign.getContext("2d"), shape, 7, 7, colour);
      if (!choosable) {
        item.append(sign, text);
        return item;
      }
      const button = make("button");
      button.type = "button";
      button.dataset.entry = entry;
      button.setAttribute("aria-pressed", String(entry === highlighted));
      button.append(sign, make("span", text));
      button.addEventListener("click", () => {
        highlighted = entry === highlighted ? null : entry;
        redraw();
      });
      item.append(button);
      return item;
    }));
    if (focused !== undefined) legend.querySelector(`button[data-entry="${focused}"]`)?.focus();
    if (current >= 0) {
      const [, x, y] = places[current];
      context.beginPath();
      context.arc(x, y, 7, 0, 2 * Math.PI);
      context.strokeStyle = css("--ink");
      context.lineWidth = 2;
      context.stroke();
    }
  };

  const select = (index) => {
    if (index === current || index < 0) return;
    current = index;
    redraw();
    const row = places[index][0];
    const lines = [data.id[row], data.sets[data.set[row]].title, ...describe(row), ...scoresOf(row)];
    point.replaceChildren(...(picture[row] >= 0 ? [canvasOf(row, 2)] : []), ...lines.map((line) => make("div", line)));
  };

  const nearest = (x, y, accept = () => true) => {
    let [best, at] = [Infinity, -1];
    places.forEach(([, px, py], index) => {
      const distance = (px - x) ** 2 + (py - y) ** 2;
      if (distance < best && accept(px, py, index)) [best, at] = [distance, index];
    });
    return [at, best];
  };

  const pointAt = (event) => {
    const box = canvas.getBoundingClientRect();
    const [at, distance] = nearest(((event.clientX - box.left) / box.width) * 760, ((event.clientY - box.top) / box.height) * 520);
    if (distance < 200) select(at);
  };
  canvas.addEventListener("pointermove", pointAt);
  canvas.addEventListener("pointerdown", pointAt); // a finger does not hover
  canvas.addEventListener("keydown", (event) => {
    const ways = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] };
    if (!(event.key in ways)) return;
    event.preventDefault();
    if (current < 0) { select(nearest(380, 260)[0]); return; }
    const [dx, dy] = ways[event.key];
    const [, x, y] = places[current];
    // The nearest patch within 45 degrees of that way.
    const [at] = nearest(x, y, (px, py, index) => {
      const along = (px - x) * dx + (py - y) * dy;
      const across = Math.abs((px - x) * dy) + Math.abs((py - y) * dx);
      return index !== current && along > 0 && across <= along;
    });
    select(at);
  });
  controls.addEventListener("input", (event) => {
    if (event.target === chosen.map) fillAxes();
    current = -1;
    point.textContent = HINT;
    redraw();
  });
  fillAxes();
}
themed();
