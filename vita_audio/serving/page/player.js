// Plays a reply as it comes, and knows how much of it was heard.
export const RATE = 24000;

export class Player {
  constructor(context) {
    this.context = context;
    this.analyser = new AnalyserNode(context, { fftSize: 1024 });
    this.analyser.connect(context.destination);
    this.sources = [];
    this.reset();
  }

  reset() {
    this.begins = null; // when the reply's first sound plays, in the context's seconds
    this.ends = 0;
    this.silent = 0; // seconds in which the player had nothing to play
  }

  play(samples) {
    const buffer = new AudioBuffer({ length: samples.length, sampleRate: RATE });
    buffer.copyToChannel(samples, 0);
    const source = new AudioBufferSourceNode(this.context, { buffer });
    source.connect(this.analyser);
    const now = this.context.currentTime;
    if (this.begins === null) this.begins = this.ends = now;
    if (this.ends < now) {
      this.silent += now - this.ends;
      this.ends = now;
    }
    source.start(this.ends);
    this.ends += buffer.duration;
    this.sources.push(source);
    source.onended = () => { this.sources = this.sources.filter((each) => each !== source); };
  }

  get playing() { return this.begins !== null && this.context.currentTime < this.ends; }

  stop() {
    const heard = this.heardMs;
    for (const source of this.sources) source.stop();
    this.sources = [];
    this.ends = this.context.currentTime;
    return heard;
  }

  get heardMs() {
    if (this.begins === null) return 0;
    const until = Math.min(this.context.currentTime, this.ends);
    return Math.max(0, Math.floor(1000 * (until - this.begins - this.silent)));
  }
}

export function fromBase64(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const pcm = new Int16Array(bytes.buffer);
  return Float32Array.from(pcm, (sample) => sample / 32768);
}

export function toBase64(samples) {
  const pcm = Int16Array.from(samples, (sample) => Math.max(-1, Math.min(1, sample)) * 32767);
  let text = "";
  for (const byte of new Uint8Array(pcm.buffer)) text += String.fromCharCode(byte);
  return btoa(text);
}
