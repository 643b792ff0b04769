"use strict";

const byId = (id) => document.getElementById(id);
const texts = ["prompt", "negative_prompt"];
const numbers = ["width", "height", "num_inference_steps", "guidance_scale", "seed", "n"];
let drawing = null;

function fields() {
  const asked = { stream: true, partial_images: 3 };
  for (const name of texts) if (byId(name).value) asked[name] = byId(name).value;
  for (const name of numbers) if (byId(name).value) asked[name] = Number(byId(name).value);
  return asked;
}

function show(event) {
  const images = byId("images");
  while (images.children.length <= event.image_index) {
    const figure = document.createElement("figure");
    figure.append(document.createElement("img"), document.createElement("figcaption"));
    images.append(figure);
  }
  const [image, caption] = images.children[event.image_index].children;
  const isPreview = event.type === "image_generation.partial_image";
  image.src = `data:image/${event.output_format};base64,${event.b64_json}`;
  image.alt = byId("prompt").value;
  image.className = isPreview ? "preview" : "done";
  image.onload = () => image.classList.toggle("small", image.naturalWidth < 256);
  image.dataset.previews = Number(image.dataset.previews || 0) + Number(isPreview);
  caption.textContent = isPreview ? "drawing …" : `seed ${event.seed}`;
}

function read(block) {
  const data = block.split("\n").filter((line) => line.startsWith("data: "))
    .map((line) => line.slice(6)).join("\n");
  if (!data || data === "[DONE]") return;
  const event = JSON.parse(data);
  if (event.error) throw new Error(event.error.message);
  show(event);
}

async function draw() {
  drawing = new AbortController();
  const headers = { "content-type": "application/json" };
  if (byId("token").value) headers.authorization = `Bearer ${byId("token").value}`;
  const response = await fetch("v1/images/generations", {
    method: "POST", headers, body: JSON.stringify(fields()), signal: drawing.signal,
  });
  if (!response.ok) throw new Error((await response.json()).error.message);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    blocks.forEach(read);
  }
}

byId("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  byId("images").replaceChildren();
  byId("draw").disabled = true;
  byId("stop").disabled = false;
  byId("status").textContent = "Drawing …";
  try {
    await draw();
    byId("status").textContent = "Done.";
  } catch (error) {
    byId("status").textContent = error.name === "AbortError" ? "Stopped." : error.message;
  }
  byId("draw").disabled = false;
  byId("stop").disabled = true;
});

byId("stop").addEventListener("click", () => drawing.abort());
