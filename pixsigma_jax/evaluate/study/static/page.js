// The page of a study: tasks, ranks by drag, tap and keys, answers that are stored.
// Texts from the server are put into the page as text, never as HTML.
"use strict";

const BASE = location.pathname.replace(/\/$/, "");
const QUESTIONS = {
  quality: "Which picture is better, whatever the prompt says?",
  match: "Which picture fits the prompt better?",
};
const LONGEST_WAIT = 10000; // milliseconds between attempts to save
const DRAG = 5; // pixels, from which a press is a drag
const MINIATURE = 128; // pixels, up to which a picture is enlarged

const at = (id) => document.getElementById(id);
const letter = (i) => String.fromCharCode(65 + i);

let about = null; // study, total, answered, criteria
let task = null; // prompt, pictures
let number = 0; // of the task, from 0; about.total when all are done
let ranks = {}; // criterion → a rank for each picture, 0 where there is none
let chosen = null; // the chip that was tapped
let zoomed = false;
let saving = false;
let seen = 0; // milliseconds that the task was to be seen
let since = 0;
let loaded = new Set();

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function say(text) {
  at("status").textContent = text;
}

// ------------------------------------------------------------------ talking to the server

async function ask(path) {
  const response = await fetch(BASE + path, { cache: "no-store" });
  if (!response.ok) throw new Error(await response.text());
  return response.json();
}

function randomNonce() {
  // randomUUID is only there behind HTTPS.
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (b) => b.toString(16).padStart(2, "0")).join("");
}

async function save() {
  if (saving || !complete()) return;
  saving = true;
  refresh();
  pause();
  const answered = number;
  const body = JSON.stringify({
    nonce: randomNonce(),
    ranks,
    note: at("note").value,
    seconds: seen / 1000,
    screen: {
      height: window.innerHeight,
      width: window.innerWidth,
      device_pixels: window.devicePixelRatio,
      zoomed,
    },
  });
  let wait = 500;
  for (;;) {
    let refused = null;
    try {
      const response = await fetch(`${BASE}/tasks/${answered}`, { method: "POST", body });
      if (response.ok) break;
      refused = await response.text();
      if (response.status < 500 && response.status !== 429) {
        say(`The answer was refused: ${refused}`);
        saving = false;
        resume();
        refresh();
        return;
      }
    } catch (error) {
      refused = "the server does not answer";
    }
    say(`Not saved yet (${refused}). Trying again; please leave the page open.`);
    await new Promise((done) => setTimeout(done, wait));
    wait = Math.min(2 * wait, LONGEST_WAIT);
  }
  say("");
  saving = false;
  forget(answered);
  if (!about.answered.includes(answered)) about.answered.push(answered);
  await go(nextOpen(answered + 1));
}

// What was ranked and not saved outlives a reload.
const draftKey = (n) => `draft ${BASE} ${n}`;

function keep() {
  try {
    const draft = { ranks, note: at("note").value };
    localStorage.setItem(draftKey(number), JSON.stringify(draft));
  } catch (error) {
    // The browser keeps nothing: then a reload begins the task again.
  }
}

function draft(n) {
  try {
    return JSON.parse(localStorage.getItem(draftKey(n)));
  } catch (error) {
    return null;
  }
}

function forget(n) {
  try {
    localStorage.removeItem(draftKey(n));
  } catch (error) {
    // There was none.
  }
}

// ------------------------------------------------------------------------------- the task

function nextOpen(from) {
  for (let i = 0; i < about.total; i++) {
    const n = (from + i) % about.total;
    if (!about.answered.includes(n)) return n;
  }
  return about.total;
}

async function go(n) {
  if (n >= about.total) n = nextOpen(0); // finished only once all is
  number = n;
  history.replaceState(null, "", `#${n + 1}`);
  const finished = n >= about.total;
  at("finished").hidden = !finished;
  if (finished) {
    at("task").hidden = true;
    task = null;
    refresh();
    return;
  }
  let next = null;
  try {
    next = await ask(`/tasks/${n}`);
  } catch (error) {
    say(`The task cannot be loaded: ${error.message}. Load the page again.`);
    return;
  }
  if (n !== number) return; // gone on meanwhile
  task = next;
  const count = task.pictures.length;
  const before = draft(n) || task.answer;
  ranks = {};
  for (const criterion of about.criteria) {
    const have = before && before.ranks[criterion];
    ranks[criterion] = have && have.length === count ? have : Array(count).fill(0);
  }
  at("note").value = before ? before.note : "";
  chosen = null;
  zoomed = false;
  at("prompt").textContent = task.prompt;
  showPictures();
  showCriteria();
  at("task").hidden = false;
  window.scrollTo(0, 0);
  seen = 0;
  resume();
  refresh();
}

function showPictures() {
  loaded = new Set();
  const shown = at("pictures");
  shown.replaceChildren();
  task.pictures.forEach((picture, i) => {
    const figure = make("figure");
    const image = make("img");
    image.alt = `Picture ${letter(i)}`;
    image.width = picture.width;
    image.height = picture.height;
    if (Math.max(picture.width, picture.height) <= MINIATURE) {
      image.className = "miniature";
    }
    const current = task;
    image.onload = () => {
      if (current !== task) return;
      loaded.add(i);
      refresh();
    };
    image.onerror = () => {
      if (current !== task) return;
      say(`Picture ${letter(i)} cannot be loaded. Load the page again.`);
    };
    image.onclick = (event) => {
      const box = image.getBoundingClientRect();
      const x = (event.clientX - box.x) / box.width;
      enlarge(i, x, (event.clientY - box.y) / box.height);
    };
    image.src = picture.address;
    figure.append(image, make("figcaption", "", letter(i)));
    shown.append(figure);
  });
  hint();
}

function hint() {
  if (!task) return;
  const device = window.devicePixelRatio;
  const width = Math.round(screen.width * device);
  const height = Math.round(screen.height * device);
  const widest = Math.max(...task.pictures.map((p) => p.width));
  const highest = Math.max(...task.pictures.map((p) => p.height));
  const hints = [];
  if (widest > width || highest > height) {
    hints.push(
      `The pictures have up to ${widest} × ${highest} pixels and your screen has ` +
        `${width} × ${height}: click one, or press Z, to see its pixels.`,
    );
  }
  if (window.innerWidth < 600) {
    hints.push("On a wider screen the pictures stand side by side.");
  }
  at("hint").textContent = hints.join(" ");
}

function showCriteria() {
  const shown = at("criteria");
  shown.replaceChildren();
  const count = task.pictures.length;
  for (const criterion of about.criteria) {
    const section = make("section", "criterion");
    section.dataset.criterion = criterion;
    section.append(make("h2", "", QUESTIONS[criterion]));
    const places = make("div", "places");
    for (let rank = 0; rank <= count; rank++) {
      const place = make("div", "place");
      place.dataset.rank = rank;
      let name = String(rank);
      if (rank === 0) name = "not placed";
      if (rank === 1) name = "1 best";
      place.append(make("small", "", name));
      place.onclick = () => {
        if (!chosen || chosen.dataset.criterion !== criterion) return;
        put(criterion, Number(chosen.dataset.picture), rank);
      };
      places.append(place);
    }
    for (let i = 0; i < count; i++) {
      const chip = make("button", "chip", letter(i));
      chip.type = "button";
      chip.dataset.picture = i;
      chip.dataset.criterion = criterion;
      chip.onkeydown = (event) => keyOnChip(event, criterion, i);
      draggable(chip, criterion, i);
      places.firstChild.append(chip);
    }
    const equal = make("button", "equal", "All are equal");
    equal.type = "button";
    equal.onclick = () => allEqual(criterion);
    section.append(places, equal);
    shown.append(section);
  }
}

const sectionOf = (criterion) => document.querySelector(`[data-criterion=${criterion}]`);
const chipOf = (criterion, i) =>
  sectionOf(criterion).querySelector(`.chip[data-picture="${i}"]`);

function put(criterion, i, rank) {
  if (saving) return;
  ranks[criterion][i] = rank;
  chosen = null;
  keep();
  refresh();
}

function allEqual(criterion) {
  if (saving) return;
  ranks[criterion].fill(1);
  chosen = null;
  keep();
  refresh();
}

const complete = () =>
  task !== null &&
  loaded.size === task.pictures.length &&
  about.criteria.every((criterion) => ranks[criterion].every((rank) => rank > 0));

function refresh() {
  at("progress").max = about.total;
  at("progress").value = about.answered.length;
  const which = number < about.total ? `Task ${number + 1} of ${about.total}, ` : "";
  at("position").textContent = `${which}${about.answered.length} saved`;
  at("back").disabled = saving || number === 0;
  at("forward").disabled = saving || number >= about.total;
  at("submit").disabled = saving || !complete();
  at("submit").textContent = saving ? "Saving …" : "Save and go on";
  if (!task) return;
  for (const criterion of about.criteria) {
    const section = sectionOf(criterion);
    ranks[criterion].forEach((rank, i) => {
      const chip = chipOf(criterion, i);
      const place = section.querySelector(`.place[data-rank="${rank}"]`);
      const where = rank ? `place ${rank}` : "not placed";
      chip.setAttribute("aria-label", `Picture ${letter(i)}, ${criterion}: ${where}`);
      chip.classList.toggle("chosen", chip === chosen);
      if (chip.parentElement !== place) {
        const focused = document.activeElement === chip;
        place.append(chip);
        if (focused) chip.focus({ preventScroll: true });
      }
    });
  }
}

// ------------------------------------------------------------------- drag, tap and keys

function draggable(chip, criterion, i) {
  let from = null;
  let moved = false;
  const over = (event) => {
    const below = document.elementFromPoint(event.clientX, event.clientY);
    const place = below && below.closest(".place");
    return place && sectionOf(criterion).contains(place) ? place : null;
  };
  const mark = (place) => {
    for (const each of sectionOf(criterion).querySelectorAll(".place")) {
      each.classList.toggle("over", each === place);
    }
  };
  const end = () => {
    from = null;
    chip.classList.remove("dragged");
    chip.style.transform = "";
    mark(null);
  };
  chip.onpointerdown = (event) => {
    if (event.button !== 0 || saving) return;
    from = { x: event.clientX, y: event.clientY };
    moved = false;
    chip.setPointerCapture(event.pointerId);
  };
  chip.onpointermove = (event) => {
    if (!from) return;
    const x = event.clientX - from.x;
    const y = event.clientY - from.y;
    if (!moved && Math.hypot(x, y) < DRAG) return;
    moved = true;
    chip.classList.add("dragged");
    chip.style.transform = `translate(${x}px, ${y}px)`;
    mark(over(event));
  };
  chip.onpointerup = (event) => {
    if (!from) return;
    const place = moved ? over(event) : null;
    end();
    if (place) put(criterion, i, Number(place.dataset.rank));
  };
  chip.onpointercancel = end;
  chip.onclick = (event) => {
    event.stopPropagation();
    if (moved) {
      moved = false; // the click that ends a drag
      return;
    }
    chosen = chosen === chip ? null : chip;
    refresh();
  };
}

// The first chip that has no place, in the order of the page.
function firstOpen() {
  for (const criterion of about.criteria) {
    const i = ranks[criterion].indexOf(0);
    if (i >= 0) return { criterion, i };
  }
  return null;
}

function focusNext() {
  const next = firstOpen();
  if (next) chipOf(next.criterion, next.i).focus();
  else at("submit").focus();
}

function keyOnChip(event, criterion, i) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const count = task.pictures.length;
  const rank = ranks[criterion][i];
  if (event.key >= "0" && event.key <= String(count) && event.key.length === 1) {
    put(criterion, i, Number(event.key));
    if (event.key !== "0") focusNext();
  } else if (event.key === "ArrowLeft") {
    put(criterion, i, Math.max(rank - 1, 0));
  } else if (event.key === "ArrowRight") {
    put(criterion, i, Math.min(rank + 1, count));
  } else if (event.key.toLowerCase() === "e") {
    allEqual(criterion);
    focusNext();
  } else {
    return;
  }
  event.preventDefault();
  event.stopPropagation();
}

document.addEventListener("keydown", (event) => {
  if (!task || event.ctrlKey || event.metaKey || event.altKey) return;
  if (at("zoom").open) {
    const count = task.pictures.length;
    if (event.key === "ArrowRight") turn((shownPicture + 1) % count);
    else if (event.key === "ArrowLeft") turn((shownPicture + count - 1) % count);
    else return;
    event.preventDefault();
    return;
  }
  if (event.target === at("note") || event.key.startsWith("Arrow")) return;
  if (event.key.toLowerCase() === "z") {
    event.preventDefault();
    enlarge(0, 0.5, 0.5);
    return;
  }
  const next = firstOpen();
  if (next) keyOnChip(event, next.criterion, next.i);
});

// ------------------------------------------------------------- one pixel for each pixel

let shownPicture = 0;

function enlarge(i, x, y) {
  zoomed = true;
  at("zoom").showModal();
  turn(i);
  const pane = at("pane");
  pane.scrollLeft = x * at("enlarged").width - pane.clientWidth / 2;
  pane.scrollTop = y * at("enlarged").height - pane.clientHeight / 2;
}

// Another picture at the same place: differences show as a flicker.
function turn(i) {
  shownPicture = i;
  const picture = task.pictures[i];
  const image = at("enlarged");
  image.src = picture.address;
  image.width = picture.width / window.devicePixelRatio;
  image.height = picture.height / window.devicePixelRatio;
  at("caption").textContent =
    `${letter(i)}: ${picture.width} × ${picture.height}, each on one pixel of the ` +
    "screen. ← → show the other pictures at the same place.";
}

(function panByMouse() {
  let from = null;
  const pane = at("pane");
  pane.onpointerdown = (event) => {
    if (event.pointerType !== "mouse") return; // a finger scrolls by itself
    from = { x: event.clientX + pane.scrollLeft, y: event.clientY + pane.scrollTop };
    pane.setPointerCapture(event.pointerId);
  };
  pane.onpointermove = (event) => {
    if (!from) return;
    pane.scrollLeft = from.x - event.clientX;
    pane.scrollTop = from.y - event.clientY;
  };
  pane.onpointerup = pane.onpointercancel = () => {
    from = null;
  };
})();

// ------------------------------------------------------------------------------ the rest

function pause() {
  if (since) seen += performance.now() - since;
  since = 0;
}

function resume() {
  if (!document.hidden && task) since = performance.now();
}

document.addEventListener("visibilitychange", () => {
  pause();
  if (!saving) resume();
});
window.addEventListener("resize", hint);
window.addEventListener("beforeunload", (event) => {
  if (saving) event.preventDefault();
});
at("note").addEventListener("input", keep);
at("submit").onclick = save;
at("close").onclick = () => at("zoom").close();
at("back").onclick = () => go(number - 1);
at("forward").onclick = () => go(number + 1);

async function start() {
  try {
    about = await ask("/tasks");
  } catch (error) {
    say(`The study cannot be loaded: ${error.message}. Load the page again.`);
    return;
  }
  at("note").maxLength = about.most_note;
  const asked = Number(location.hash.slice(1)) - 1;
  const valid = Number.isInteger(asked) && asked >= 0 && asked < about.total;
  await go(valid ? asked : nextOpen(0));
}

start();
