// Talks to /v1/realtime: microphone in, sound and text of both sides out.
import { Player, RATE, fromBase64, toBase64 } from "/page/player.js";

const at = (id) => document.getElementById(id);
const turns = new Map(); // item id -> its list entry
const remembered = []; // ids of the items that the server holds
let key = sessionStorage.getItem("key") ?? "";
let model, socket, context, microphone, player, stoppedAt, itemPlaying;

at("talk").onclick = () => (microphone ? stopTalking() : startTalking());
at("interrupt").onclick = interrupt;
at("voice").onchange = at("mode").onchange = () => socket?.readyState === 1 && configure();
at("type").onsubmit = (event) => { event.preventDefault(); sendText(); };
at("key-form").onsubmit = (event) => {
  event.preventDefault();
  key = at("key").value;
  sessionStorage.setItem("key", key);
  loadModel();
};
document.addEventListener("keydown", (event) => { if (event.key === "Escape") interrupt(); });
loadModel();
requestAnimationFrame(draw);

async function loadModel() {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const [models, voices] = await Promise.all(["models", "voices"].map((name) => fetch(`/v1/${name}`, { headers })));
  at("key-form").hidden = models.ok;
  if (!models.ok) return say((await models.json()).error.message, true);
  model = (await models.json()).data[0].id;
  at("model").textContent = model;
  at("voice").replaceChildren(...(await voices.json()).data.map((voice) => new Option(voice.id)));
  say("Press “Start talking”, then ask aloud.");
}

async function connect() {
  if (socket?.readyState === 1) return;
  context ??= new AudioContext({ sampleRate: RATE });
  await context.resume();
  player ??= new Player(context);
  const address = `${location.origin.replace(/^http/, "ws")}/v1/realtime?model=${encodeURIComponent(model)}`;
  socket = new WebSocket(address, key ? ["realtime", `openai-insecure-api-key.${key}`] : ["realtime"]);
  socket.onmessage = (message) => hear(JSON.parse(message.data));
  socket.onclose = () => { stopTalking(); say("The connection has ended. Press “Start talking” to begin again.", true); };
  await new Promise((resolve, reject) => {
    socket.onopen = resolve;
    socket.onerror = () => reject(new Error("The server does not accept the connection."));
  });
  configure();
}

function configure() {
  const mode = at("mode").value;
  const audio = { output: { voice: at("voice").value }, input: { transcription: { model } } };
  const choice = { mode: mode === "lossless" || !mode ? null : mode, lossless: mode === "lossless" };
  send("session.update", { session: { type: "realtime", audio, ...choice } });
}

async function startTalking() {
  at("talk").disabled = true;
  try {
    if (!navigator.mediaDevices) throw new Error("The browser gives the microphone only to https:// pages and to localhost.");
    // The model was trained on sound as it is; only the echo of its own voice has to go.
    const sound = { echoCancellation: true, noiseSuppression: false, autoGainControl: false };
    const stream = await navigator.mediaDevices.getUserMedia({ audio: sound });
    await connect();
    await context.audioWorklet.addModule("/page/microphone.js");
    const source = new MediaStreamAudioSourceNode(context, { mediaStream: stream });
    const worklet = new AudioWorkletNode(context, "microphone", { numberOfOutputs: 0 });
    const analyser = new AnalyserNode(context, { fftSize: 1024 });
    source.connect(worklet);
    source.connect(analyser);
    worklet.port.onmessage = ({ data }) => send("input_audio_buffer.append", { audio: toBase64(data) });
    microphone = { stream, source, analyser };
    at("talk").textContent = "Stop talking";
    say("Listening …");
  } catch (error) {
    const refused = { NotAllowedError: "The microphone was refused. Allow it in the browser’s address bar, or type below.",
      NotFoundError: "There is no microphone. Connect one, or type below." };
    say(refused[error.name] ?? error.message, true);
  } finally {
    at("talk").disabled = false;
  }
}

function stopTalking() {
  microphone?.stream.getTracks().forEach((track) => track.stop());
  microphone?.source.disconnect();
  microphone = undefined;
  at("talk").textContent = "Start talking";
}

async function sendText() {
  const text = at("text").value.trim();
  if (!text) return;
  try {
    await connect();
  } catch (error) {
    return say(error.message, true);
  }
  interrupt();
  forget();
  at("text").value = "";
  send("conversation.item.create", { item: { type: "message", role: "user", content: [{ type: "input_text", text }] } });
  stoppedAt = performance.now();
  send("response.create");
}

function interrupt() {
  if (at("interrupt").disabled) return;
  if (!at("interrupt").dataset.done) send("response.cancel");
  silence(true);
}

// Ends the sound, or the wait for more of it. The server learns how much was heard, so that the model remembers no more
// than that.
function silence(tell) {
  const goesOn = !at("interrupt").disabled && (player?.playing || !at("interrupt").dataset.done);
  if (goesOn && itemPlaying && player.begins !== null) {
    const heard = player.stop();
    note(itemPlaying, `interrupted after ${(heard / 1000).toFixed(1)} s`);
    if (tell) send("conversation.item.truncate", { item_id: itemPlaying, content_index: 0, audio_end_ms: heard });
  }
  at("interrupt").disabled = true;
}

function hear(event) {
  const handlers = {
    "input_audio_buffer.speech_started": () => { silence(true); forget(); say("Listening …"); show(event.item_id, "you").textContent = "…"; },
    "input_audio_buffer.speech_stopped": () => { stoppedAt = performance.now(); say("Answering …"); },
    "conversation.item.added": () => {
      remembered.push(event.item.id);
      const [content] = event.item.content;
      if (event.item.role === "user") show(event.item.id, "you").textContent = content.text ?? "…";
    },
    "conversation.item.input_audio_transcription.completed": () => { show(event.item_id, "you").textContent = event.transcript; },
    "response.output_item.added": () => {
      player.reset();
      itemPlaying = event.item.id;
      at("interrupt").disabled = false;
      at("interrupt").dataset.done = "";
      show(itemPlaying, "model");
    },
    "response.output_audio_transcript.delta": () => { show(event.item_id, "model").textContent += event.delta; },
    "response.output_audio.delta": () => {
      if (event.item_id !== itemPlaying || at("interrupt").disabled) return;
      if (player.begins === null && stoppedAt) {
        note(itemPlaying, `first sound ${Math.round(performance.now() - stoppedAt)} ms after the end of your turn`);
      }
      player.play(fromBase64(event.delta));
    },
    "response.done": () => {
      at("interrupt").dataset.done = "yes";
      const error = event.response.status_details?.error;
      say(error ? error.message : microphone ? "Listening …" : "", Boolean(error));
    },
    error: () => { if (event.error.code !== "response_cancel_not_active") say(event.error.message, true); },
  };
  handlers[event.type]?.();
}

// Deletes the earlier turns from the model's history; they stay on the page.
function forget() {
  if (at("remember").checked) return;
  for (const id of remembered.splice(0)) send("conversation.item.delete", { item_id: id });
}

function send(type, content = {}) {
  if (socket?.readyState === 1) socket.send(JSON.stringify({ type, ...content }));
}

function show(id, who) {
  if (!turns.has(id)) {
    const entry = document.createElement("li");
    entry.className = who;
    entry.innerHTML = '<span class="who"></span><span class="said"></span><small></small>';
    entry.firstChild.textContent = who === "you" ? "You" : "Model";
    at("turns").append(entry);
    entry.scrollIntoView({ block: "nearest" });
    turns.set(id, entry);
  }
  return turns.get(id).children[1];
}

function note(id, text) {
  const place = turns.get(id)?.children[2];
  if (place) place.textContent += (place.textContent ? " · " : "") + text;
}

function say(text, isError = false) {
  at("status").textContent = text;
  at("status").className = isError ? "error" : "";
}

function draw() {
  const canvas = at("wave"), pen = canvas.getContext("2d"), style = getComputedStyle(document.body);
  canvas.width = canvas.clientWidth * devicePixelRatio;
  canvas.height = canvas.clientHeight * devicePixelRatio;
  for (const [analyser, colour] of [[microphone?.analyser, "--you"], [player?.analyser, "--model"]]) {
    const samples = new Float32Array(1024);
    analyser?.getFloatTimeDomainData(samples);
    pen.strokeStyle = style.getPropertyValue(colour);
    pen.lineWidth = devicePixelRatio * 1.5;
    pen.beginPath();
    samples.forEach((sample, i) => pen.lineTo((i / 1023) * canvas.width, (0.5 - sample / 1.2) * canvas.height));
    pen.stroke();
  }
  if (player && !player.playing && at("interrupt").dataset.done) at("interrupt").disabled = true;
  requestAnimationFrame(draw);
}
