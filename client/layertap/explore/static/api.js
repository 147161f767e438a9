// Asks the process that serves this page, and reads its messages: a header in JSON, then arrays as they are in memory.

export class Refusal extends Error {
  constructor({ code, details, retry_after_s: retryAfter }) {
    super(details);
    this.code = code;
    this.retryAfter = retryAfter;
  }
}

// The process that serves this page is gone, or the connection to it.
export class Gone extends Error {}

// Yields the messages of an answer, each as { ...header, arrays: { name: { values, shape } } }.
export async function* messages(view, fields, { signal, file } = {}) {
  const headers = file ? { "X-File-Name": encodeURIComponent(file.name) } : { "Content-Type": "application/json" };
  let answer;
  try {
    answer = await fetch(`api/${view}`, { method: "POST", headers, body: file ?? JSON.stringify(fields), signal });
  } catch (error) {
    throw error.name === "AbortError"
      ? error
      : new Gone("the page's own process has ended; run layertap explore again");
  }
  if (!(answer.headers.get("content-type") ?? "").startsWith("application/octet-stream")) {
    throw new Refusal({ code: "UNKNOWN", details: (await answer.text()).trim() });
  }
  const reader = new Reader(answer.body.getReader());
  for (;;) {
    const sizes = await reader.take(8);
    if (sizes === null) return;
    const [headerSize, size] = new Uint32Array(sizes);
    const header = JSON.parse(new TextDecoder().decode(await reader.take(headerSize)));
    const data = await reader.take(size);
    if (header.error) throw new Refusal(header.error);
    const arrays = {};
    for (const { name, dtype, shape, offset } of header.arrays) {
      const kind = dtype === "float32" ? Float32Array : Int32Array;
      arrays[name] = {
        values: new kind(
          data,
          offset,
          shape.reduce((a, b) => a * b, 1),
        ),
        shape,
      };
    }
    yield { ...header, arrays };
  }
}

// Returns the only message of an answer.
export async function ask(view, fields, options) {
  for await (const message of messages(view, fields, options)) return message;
  throw new Gone("the answer is empty; run layertap explore again");
}

class Reader {
  constructor(stream) {
    this.stream = stream;
    this.chunks = [];
    this.held = 0;
  }

  // Returns an ArrayBuffer of so many bytes, or null at the end.
  async take(size) {
    while (this.held < size) {
      let part;
      try {
        part = await this.stream.read();
      } catch (error) {
        throw error.name === "AbortError" ? error : new Gone("the answer broke off; run layertap explore again");
      }
      if (part.done) {
        if (this.held) throw new Gone("the answer broke off; run layertap explore again");
        return null;
      }
      this.chunks.push(part.value);
      this.held += part.value.length;
    }
    const whole = new Uint8Array(size);
    let filled = 0;
    while (filled < size) {
      const chunk = this.chunks[0];
      const used = Math.min(chunk.length, size - filled);
      whole.set(chunk.subarray(0, used), filled);
      filled += used;
      if (used === chunk.length) this.chunks.shift();
      else this.chunks[0] = chunk.subarray(used);
    }
    this.held -= size;
    return whole.buffer;
  }
}
