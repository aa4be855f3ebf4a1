"use strict";
(() => {
  const { runs } = JSON.parse(document.getElementById("data").textContent);
  const page = document.getElementById("page");
  const color = (i) => `var(--c${i % 5})`;
  const SVG = "http://www.w3.org/2000/svg";

  const make = (tag, attributes = {}, ...children) => {
    const found = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) found.setAttribute(key, value);
    found.append(...children);
    return found;
  };
  const draw = (tag, attributes = {}, text = "") => {
    const found = document.createElementNS(SVG, tag);
    for (const [key, value] of Object.entries(attributes)) found.setAttribute(key, value);
    found.textContent = text;
    return found;
  };
  const section = (title, ...children) => make("section", {}, make("h2", {}, title), ...children);
  const picture = (src, alt) => make("img", { src, alt });
  const figure = (caption, src) => make("figure", {}, make("figcaption", {}, caption), picture(src, caption));
  const short = (value) => (Math.abs(value) >= 1e4 ? `${+(value / 1e3).toPrecision(3)}k` : Math.abs(value) < 1e-3 && value ? value.toExponential(0) : `${+value.toPrecision(3)}`);
  const plain = (value) => {
    const size = Math.abs(value);
    if (size >= 1e6) return `${+(value / 1e6).toPrecision(4)}M`;
    if (size >= 1e4) return `${+(value / 1e3).toPrecision(4)}k`;
    return size && size < 1e-3 ? value.toExponential(1) : `${+value.toPrecision(4)}`;
  };

  // A line chart. series: [{name, color, points: [[x, y], ...], dots}], marks: [{x, text, kind}].
  function chart(title, series, { log = false, share = false, marks = [] } = {}) {
    series = series.map((s) => ({ ...s, points: s.points.filter(([x, y]) => x !== null && y !== null && (!log || y > 0)) }));
    series = series.filter((s) => s.points.length);
    if (!series.length) return null;
    const width = 520, height = 240, left = 52, right = 12, top = 10, bottom = 30;
    const xs = series.flatMap((s) => s.points.map((p) => p[0]));
    const ys = series.flatMap((s) => s.points.map((p) => p[1]));
    const scale = (value) => (log ? Math.log10(value) : value);
    const last = Math.max(...xs, 1e-9);
    let low = Math.min(...ys.map(scale)), high = Math.max(...ys.map(scale));
    if (!log) low = Math.min(0, low);
    if (high - low < 1e-12) { high += 1e-3 + Math.abs(high) * 0.1; low -= log ? 0.1 : 0; }
    const px = (x) => left + (x / last) * (width - left - right);
    const py = (y) => height - bottom - ((scale(y) - low) / (high - low)) * (height - top - bottom);
    const show = (y, format = plain) => (share ? `${+(100 * y).toPrecision(2)}%` : format(y));
    const root = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
    root.append(draw("title", {}, title));
    for (let i = 0; i <= 4; i++) {
      const value = low + ((high - low) * i) / 4, at = height - bottom - ((height - top - bottom) * i) / 4;
      root.append(draw("line", { class: "grid", x1: left, x2: width - right, y1: at, y2: at }));
      root.append(draw("text", { x: left - 6, y: at + 4, "text-anchor": "end" }, show(log ? 10 ** value : value, short)));
    }
    for (let i = 0; i <= 4; i++) {
      const value = (last * i) / 4;
      root.append(draw("text", { x: px(value), y: height - 10, "text-anchor": i === 4 ? "end" : i ? "middle" : "start" }, short(value) + (i === 4 ? " images" : "")));
    }
    for (const mark of marks) {
      if (mark.x <= 0 || mark.x > last) continue;
      const line = draw("line", { class: mark.kind, x1: px(mark.x), x2: px(mark.x), y1: top, y2: height - bottom });
      line.append(draw("title", {}, mark.text));
      root.append(line);
    }
    for (const one of series) {
      const points = one.points.map(([x, y]) => `${px(x).toFixed(1)},${py(y).toFixed(1)}`);
      root.append(draw("polyline", { points: points.join(" "), fill: "none", stroke: one.color, "stroke-width": 1.8, "stroke-linejoin": "round", "stroke-dasharray": one.dash || "none" }));
      if (one.points.length < 40) for (const [x, y] of one.points) root.append(draw("circle", { cx: px(x), cy: py(y), r: 2.5, fill: one.color }));
    }
    const legend = make("div", { class: "legend" });
    const readings = series.map((one) => {
      const value = make("span");
      legend.append(make("span", {}, Object.assign(make("i"), { style: `background:${one.color}` }), `${one.name} `, value));
      return value;
    });
    const read = (x) => series.forEach((one, i) => {
      const [at, y] = one.points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
      readings[i].textContent = `${show(y)} at ${plain(at)}`;
    });
    root.addEventListener("pointermove", (event) => {
      const box = root.getBoundingClientRect();
      read((((event.clientX - box.left) / box.width) * width - left) / (width - left - right) * last);
    });
    read(last);
    return make("figure", {}, make("h3", {}, title), root, legend);
  }

  function slider(label, frames, show, start) {
    const image = picture(frames[start].src, label);
    const input = make("input", { type: "range", min: 0, max: frames.length - 1, value: start, "aria-label": label });
    const output = make("output", {}, show(frames[start]));
    const set = () => {
      const frame = frames[+input.value];
      image.src = frame.src;
      output.textContent = show(frame);
    };
    input.addEventListener("input", set);
    return { input, set, body: make("div", {}, make("div", { class: "slider" }, input, output), image) };
  }

  function film(frames) {
    const one = slider("Step of training", frames, (f) => `${plain(f.images)} images`, frames.length - 1);
    const button = make("button", { type: "button" }, "Play");
    let timer = null;
    button.addEventListener("click", () => {
      if (timer) { clearInterval(timer); timer = null; button.textContent = "Play"; return; }
      button.textContent = "Stop";
      one.input.value = 0;
      one.set();
      timer = setInterval(() => {
        one.input.value = (+one.input.value + 1) % frames.length;
        one.set();
      }, 350);
    });
    one.body.prepend(button);
    return one.body;
  }

  const columns = (run, name) => (run.metrics[name] ? run.metrics[name].map((y, i) => [run.metrics.images ? run.metrics.images[i] : run.metrics.step[i], y]) : []);
  const several = runs.length > 1;
  const curves = (name, label) => runs.map((run, i) => ({ name: several ? run.name : label, color: color(i), points: columns(run, name) }));
  const bands = (run) => Object.keys(run.metrics).filter((name) => name.startsWith("loss_sigma_")).map((name, i) => (
    { name: `sigma ${name.slice("loss_sigma_".length).replaceAll("_", " ")}`, color: color(i), points: columns(run, name) }));
  const marks = several ? [] : [
    ...runs[0].phases.map((p) => ({ x: p.images, text: `from here on: ${p.text}`, kind: "mark" })),
    ...runs[0].resumed.map((x) => ({ x, text: "resumed here", kind: "resumed" })),
  ];

  const title = several ? `${runs.length} runs` : runs[0].name;
  page.replaceChildren(make("header", {}, make("h1", {}, title), make("p", { class: "soft" }, several ? runs.map((r) => r.name).join(" · ") : runs[0].status)));

  if (several) {
    const names = [...new Set(runs.flatMap((run) => run.facts.map(([name]) => name)))];
    const head = make("tr", {}, make("th"), ...runs.map((run, i) => Object.assign(make("th", {}, run.name), { style: `border-bottom-color:${color(i)}` })));
    const rows = [["status", (run) => run.status], ...names.map((name) => [name, (run) => (run.facts.find(([n]) => n === name) || ["", "-"])[1]])];
    page.append(section("Side by side", make("div", { class: "scroll" }, make("table", {}, head, ...rows.map(([name, of]) => make("tr", {}, make("th", {}, name), ...runs.map((run) => make("td", {}, of(run)))))))));
  } else {
    page.append(section("Run", make("dl", { class: "facts" }, ...runs[0].facts.flatMap(([name, value]) => [make("div", {}, make("dt", {}, name), make("dd", {}, value))]))));
  }
  for (const run of runs) for (const note of run.notes) page.append(make("section", { class: "note" }, several ? `${run.name}: ${note}` : note));

  const grids = runs.flatMap((run) => run.grids.map((grid) => figure(`${several ? `${run.name}, ` : ""}${grid.evaluations} network evaluation${grid.evaluations > 1 ? "s" : ""}`, grid.src)));
  if (grids.length) page.append(section("Samples of the newest checkpoint", make("p", { class: "soft small" }, "The same seeds in every grid."), make("div", { class: "row" }, ...grids)));

  for (const run of runs.filter((each) => each.strips.length)) {
    const about = "One column per sample of the training data: what the model was given, what it draws from that, and the image it belongs to. The model was trained on these pairs.";
    page.append(section(`${several ? `${run.name}: samples` : "Samples"} of the newest checkpoint and their conditioning images`,
      make("p", { class: "soft small" }, about), make("div", { class: "strips" }, ...run.strips.map((strip) => figure(strip.label, strip.src)))));
  }

  const scored = ["fid", "fd"].flatMap((name) => {
    const all = runs.flatMap((run, i) => [...new Set(run.scores.map((s) => s.evaluations))].map((n, k) => ({
      name: `${several ? `${run.name}, ` : ""}${n} evaluation${n > 1 ? "s" : ""}`, color: several ? color(i) : color(k), dash: several && k ? "4 3" : "",
      points: run.scores.filter((s) => s.evaluations === n && s[name] !== undefined).map((s) => [s.images, s[name]]),
    })));
    return [chart(name === "fid" ? "FID" : "Fréchet distance", all, { log: true, marks })];
  });
  const plots = [
    ...scored,
    chart("Loss", curves("loss", "loss"), { log: true, marks }),
    several ? null : chart("Loss by noise level", bands(runs[0]), { log: true, marks }),
    chart("Gradient norm", curves("gradient_norm", "norm"), { log: true, marks }),
    chart("Learning rate", curves("learning_rate", "rate"), { marks }),
  ].filter(Boolean);
  if (plots.length) {
    const about = make("p", { class: "soft small" }, several ? "Over images seen." : "Over images seen. Dashed: the objective goes on to its next phase, with whose loss that before does not compare. Dotted: resumed.");
    const phases = several || runs[0].phases.length < 2 ? [] : [make("p", { class: "soft small" }, `Phases: ${runs[0].phases.map((p) => `${p.text} from ${plain(p.images)}`).join("; ")}.`)];
    page.append(section("Training", about, make("div", { class: "plots" }, ...plots), ...phases));
  }

  runs.forEach((run, i) => {
    if (several) page.append(Object.assign(make("div", { class: "run" }, make("h2", {}, run.name), make("p", { class: "soft" }, run.status)), { style: `--own:${color(i)}` }));
    const parts = [];
    if (run.film.length > 1) {
      const beside = run.beside.map((each) => figure(`${each.label} of these samples`, each.src));
      parts.push(section("The same seeds through training", film(run.film), ...(beside.length ? [make("div", { class: "row beside" }, ...beside)] : [])));
    }
    if (run.levels) {
      const frames = run.levels.frames;
      parts.push(section("What one evaluation says at each noise level",
        make("p", { class: "soft small" }, "Samples of the model, the same with noise (scaled to be visible), and the network's estimate of them."),
        picture(run.levels.images, "samples without noise"), slider("Noise level", frames, (f) => `sigma ${plain(f.sigma)}`, Math.floor(frames.length / 2)).body));
    }
    if (run.state.length) parts.push(section("The x0-state of eight samples",
      make("p", { class: "soft small" }, "The estimates that the store and the checkpoints still keep, the oldest first."),
      slider("Generation", run.state, (s) => s.name, run.state.length - 1).body));
    if (parts.length) page.append(make("div", { class: "row" }, ...parts));
  });

  const speed = [
    chart("Images per second", curves("images_per_second", "images/s")),
    chart("Time waiting for the store", curves("store_wait_fraction", "share"), { share: true }),
    chart("Time waiting for images", curves("data_wait_fraction", "share"), { share: true }),
    chart("Refined visits", curves("refined_fraction", "share"), { share: true }),
  ].filter(Boolean);
  if (speed.length) page.append(section("Throughput", make("div", { class: "plots" }, ...speed)));

  page.append(section("Configuration and environment", make("p", { class: "soft small" }, `Written ${runs[0].written}.`),
    ...runs.map((run) => make("details", {}, make("summary", {}, several ? `Configuration of ${run.name}` : "Configuration"), make("pre", {}, run.config)))));
})();
