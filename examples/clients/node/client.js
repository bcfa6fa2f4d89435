// The label of a text, asked from Node.js: npm ci, then node client.js HOST:PORT MODEL TEXT
const path = require("path");
const { promisify } = require("util");
const grpc = require("@grpc/grpc-js");
const protoLoader = require("@grpc/proto-loader");

const proto = path.join(__dirname, "..", "..", "..", "protos", "inference.proto");
const { inference } = grpc.loadPackageDefinition(protoLoader.loadSync(proto, { keepCase: true }));

async function label(client, model, text) {
  const call = (name, request) => promisify(client[name]).call(client, request, { deadline: Date.now() + 30000 });
  const metadata = await call("ModelMetadata", { name: model });
  const answer = await call("ModelInfer", {
    model_name: model,
    inputs: [
      {
        name: metadata.inputs[0].name,
        datatype: "BYTES",
        shape: [1, 1], // one row, one text
        contents: { bytes_contents: [Buffer.from(text)] },
      },
    ],
    outputs: [{ name: "label" }],
  });
  const raw = answer.raw_output_contents[0];
  return raw.subarray(4, 4 + raw.readUInt32LE(0)).toString(); // its length stands before every element
}

const [address, model, text] = process.argv.slice(2);
const client = new inference.GRPCInferenceService(address, grpc.credentials.createInsecure());
label(client, model, text)
  .then(console.log)
  .catch((error) => {
    console.error(error.message);
    process.exitCode = 1;
  })
  .finally(() => client.close());
