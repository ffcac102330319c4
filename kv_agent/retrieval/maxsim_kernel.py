"""The best cosine of each token of a query with a token of each document, straight from one byte a value.

Products are of whole numbers: processors multiply and add many of these at once, and no floats are made of
any stored token. Documents are read where they lie.

Legend: N documents, T tokens of all of them, t tokens of the query, V values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from kv_agent.kv.vector_words import address_pointer
from kv_agent.retrieval.sketches import Floats
from kv_agent.retrieval.token_space import Query, Tokens


def best_cosines(query: Query, documents: Sequence[Tokens]) -> Floats:
    """-> [N, t]; of documents with at least one token each, and the V of the query, else ``ValueError``."""
    size = query.values_tV.shape[1]
    for document in documents:  # machine code would read whatever lies behind
        num_tokens = len(document.scales_T)
        if document.levels_TV.shape != (num_tokens, size) or len(document.inverse_T) != num_tokens:
            raise ValueError(f"tokens of shape {document.levels_TV.shape} are not [{num_tokens}, {size}]")
    best_Nt = np.empty((len(documents), len(query.offsets_t)), dtype=np.float32)
    kept_alive = [np.ascontiguousarray(document.levels_TV, dtype=np.int8) for document in documents]
    inverse_T = np.concatenate([document.inverse_T for document in documents])
    compiled()(
        np.array([levels_TV.__array_interface__["data"][0] for levels_TV in kept_alive], dtype=np.uint64),
        np.array([len(levels_TV) for levels_TV in kept_alive], dtype=np.int64),
        np.concatenate([document.scales_T for document in documents]) * inverse_T,
        inverse_T,
        *query,
        best_Nt,
    )
    return best_Nt


@cache
def compiled() -> Callable[..., None]:
    """The machine code, made once a process in half a second; it runs without the GIL."""
    import numba  # takes a second, unless vLLM has imported it

    levels_at = address_pointer(np.int8)

    def best(
        addresses_N: Any,
        sizes_N: Any,
        factors_T: Any,
        inverse_T: Any,
        values_tV: Any,
        scales_t: Any,
        offsets_t: Any,
        best_Nt: Any,
    ) -> None:
        t, V = values_tV.shape
        first = 0
        for n in range(len(addresses_N)):
            levels_TV = numba.carray(levels_at(addresses_N[n]), (sizes_N[n], V))
            best_Nt[n] = -np.inf
            for token in range(sizes_N[n]):
                factor, inverse = factors_T[first + token], inverse_T[first + token]
                for asked in range(t):
                    total = np.int32(0)
                    for v in range(V):
                        product = np.int32(levels_TV[token, v]) * np.int32(values_tV[asked, v])
                        total = np.int32(total + product)  # else numba adds up in 64 bits
                    cosine = np.float32(total) * scales_t[asked] * factor - inverse * offsets_t[asked]
                    best_Nt[n, asked] = max(best_Nt[n, asked], cosine)
            first += sizes_N[n]

    floats, integers = numba.float32, numba.int64
    signature = numba.void(
        numba.uint64[::1], integers[::1], floats[::1], floats[::1],
        numba.int16[:, ::1], floats[::1], floats[::1], floats[:, ::1],
    )  # fmt: skip
    machine_code: Callable[..., None] = numba.njit(signature, nogil=True, error_model="numpy")(best)
    return machine_code
