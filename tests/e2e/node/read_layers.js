// Reads layers with @grpc/grpc-js and nothing but its defaults.
//   echo '["a text"]' | node read_layers.js 127.0.0.1:50051
// prints layers, token_counts, frame_count, values (one list a layer) and pooled as JSON.
'use strict';

const assert = require('node:assert/strict');
const fs = require('node:fs');
const path = require('node:path');
const grpc = require('@grpc/grpc-js');
const loader = require('@grpc/proto-loader');

const PROTO = path.join(__dirname, '../../../protos/layertap/v1/embedding.proto');
const FLOAT32 = 1;
const TOKEN = 1;

const { layertap } = grpc.loadPackageDefinition(
  loader.loadSync(PROTO, { defaults: true, enums: Number, longs: Number, oneofs: true }),
);

// Frames and tensors begin anywhere in memory, so that a view would not be aligned.
const floats = (data) => new Float32Array(new Uint8Array(data).buffer);

async function readLayers(client, inputs) {
  let header, summary, starts, rowCount, layers;
  let frameCount = 0;
  const options = { outputs: [{ hiddenStates: { allLayers: true } }] };
  for await (const message of client.embedLayers({ inputs, options })) {
    assert(!summary, 'the summary is the last message');
    if (!header) {
      assert.equal(message.part, 'header', 'the header is the first message');
      header = message.header;
      assert.equal(header.dtype, FLOAT32);
      assert.equal(header.outputs.length, 1);
      assert.equal(header.outputs[0].unit, TOKEN);
      assert.deepEqual(header.outputs[0].layers, Array.from({ length: header.layerCount + 1 }, (_, k) => k));
      assert.equal(header.tokenCounts.length, inputs.length);
      assert.deepEqual(header.truncated, inputs.map(() => false));
      rowCount = 0;
      starts = header.tokenCounts.map((count) => (rowCount += count) - count);
      layers = header.outputs[0].layers.map(() => ({
        values: new Float32Array(rowCount * header.outputs[0].rowSize),
        spans: [],
      }));
    } else if (message.part === 'summary') {
      summary = message.summary;
    } else {
      assert.equal(message.part, 'frame');
      const { frame, data } = message;
      const { rowSize } = header.outputs[0];
      assert.equal(frame.outputIndex, 0);
      assert(frame.rowCount > 0 && frame.firstRow < header.tokenCounts[frame.firstText]);
      assert.equal(data.length, frame.rowCount * rowSize * 4);
      const first = starts[frame.firstText] + frame.firstRow;
      layers[frame.layer].values.set(floats(data), first * rowSize);
      layers[frame.layer].spans.push([first, first + frame.rowCount]);
      frameCount++;
    }
  }
  assert(summary, 'the stream ended without its summary');
  assert.equal(summary.frameCount, frameCount);
  for (const { spans } of layers) {
    let end = 0;
    for (const [first, next] of spans.sort((one, other) => one[0] - other[0])) {
      assert.equal(first, end, 'every row comes once');
      end = next;
    }
    assert.equal(end, rowCount, 'every row comes');
  }
  return {
    layers: header.outputs[0].layers,
    token_counts: header.tokenCounts,
    frame_count: frameCount,
    values: layers.map(({ values }) => Array.from(values)),
  };
}

async function readPooled(client, inputs) {
  const options = { outputs: [{ pooledVectors: {} }] };
  const answer = await new Promise((resolve, reject) =>
    client.embed({ inputs, options }, (error, found) => (error ? reject(error) : resolve(found))),
  );
  assert.equal(answer.tensors.length, 1);
  const { dtype, shape, data } = answer.tensors[0].tensor;
  assert.equal(dtype, FLOAT32);
  assert.deepEqual(shape, [inputs.length, answer.header.outputs[0].rowSize]);
  return Array.from(floats(data));
}

async function main() {
  const inputs = JSON.parse(fs.readFileSync(0, 'utf8')).map((text) => ({ text }));
  const client = new layertap.v1.EmbeddingService(process.argv[2], grpc.credentials.createInsecure());
  const found = { ...(await readLayers(client, inputs)), pooled: await readPooled(client, inputs) };
  client.close();
  process.stdout.write(JSON.stringify(found));
}

main().catch((error) => {
  console.error(error);
  process.exitCode = 1;
});
