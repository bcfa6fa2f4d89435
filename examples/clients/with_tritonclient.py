"""The label of a text, asked with Triton's own client (pip install 'tritonclient[grpc]').

python with_tritonclient.py HOST:PORT MODEL TEXT
"""

import sys

import numpy as np
import tritonclient.grpc as triton

address, model, text = sys.argv[1:]
with triton.InferenceServerClient(address) as client:
    column = client.get_model_metadata(model).inputs[0].name
    texts = triton.InferInput(column, [1, 1], "BYTES")  # one row, one text
    texts.set_data_from_numpy(np.array([[text.encode()]], object))
    answer = client.infer(model, [texts], outputs=[triton.InferRequestedOutput("label")])
    print(answer.as_numpy("label")[0, 0].decode())
