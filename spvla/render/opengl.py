"""The OpenGL calls that draw a mesh, straight from the driver's library: PyOpenGL's own cost several times as much."""

import ctypes
from collections.abc import Callable
from typing import Any

_INT, _UINT, _FLOAT, _BYTES = ctypes.c_int, ctypes.c_uint, ctypes.c_float, ctypes.c_void_p
_FLAG = ctypes.c_ubyte
_CALLS = {
    "glActiveTexture": (_UINT,),
    "glBeginQuery": (_UINT, _UINT),
    "glBindBuffer": (_UINT, _UINT),
    "glBindTexture": (_UINT, _UINT),
    "glBlendFunc": (_UINT, _UINT),
    "glBufferData": (_UINT, ctypes.c_ssize_t, _BYTES, _UINT),
    "glColor4fv": (_BYTES,),
    "glColorMask": (_FLAG, _FLAG, _FLAG, _FLAG),
    "glDeleteQueries": (_INT, _BYTES),
    "glDepthFunc": (_UINT,),
    "glDepthMask": (_FLAG,),
    "glDisable": (_UINT,),
    "glDisableClientState": (_UINT,),
    "glDrawElements": (_UINT, _INT, _UINT, _BYTES),
    "glEnable": (_UINT,),
    "glEnableClientState": (_UINT,),
    "glEndQuery": (_UINT,),
    "glGenBuffers": (_INT, _BYTES),
    "glGenQueries": (_INT, _BYTES),
    "glGetQueryObjectuiv": (_UINT, _UINT, _BYTES),
    "glMaterialf": (_UINT, _UINT, _FLOAT),
    "glMaterialfv": (_UINT, _UINT, _BYTES),
    "glMultMatrixf": (_BYTES,),
    "glNormalPointer": (_UINT, _INT, _BYTES),
    "glPopMatrix": (),
    "glPushMatrix": (),
    "glTexCoordPointer": (_INT, _UINT, _INT, _BYTES),
    "glTranslatef": (_FLOAT, _FLOAT, _FLOAT),
    "glVertexPointer": (_INT, _UINT, _INT, _BYTES),
}


class OpenGL:
    """The calls by name, and their constants. Import it once a context is open: only then is the library chosen."""

    def __init__(self) -> None:
        from OpenGL import GL, platform

        self.constants = GL
        for name, types in _CALLS.items():
            setattr(self, name, ctypes.CFUNCTYPE(None, *types)((name, platform.PLATFORM.GL)))

    def __getattr__(self, name: str) -> Any:
        """TRIANGLES is GL_TRIANGLES, and so on."""
        value = int(getattr(self.constants, f"GL_{name}"))
        setattr(self, name, value)
        return value

    def upload(self, content: bytes) -> int:
        """A buffer that the renderer keeps, with this in it."""
        buffer = ctypes.c_uint()
        self.glGenBuffers(1, ctypes.byref(buffer))
        self.glBindBuffer(self.ARRAY_BUFFER, buffer)
        self.glBufferData(self.ARRAY_BUFFER, len(content), content, self.STATIC_DRAW)
        self.glBindBuffer(self.ARRAY_BUFFER, 0)
        return buffer.value

    def samples_at_depth(self, draw: Callable[[], object]) -> int:
        """A query that counts where `draw` would lie at exactly the depth already drawn; it draws nothing."""
        query = ctypes.c_uint()
        self.glGenQueries(1, ctypes.byref(query))
        self.glColorMask(0, 0, 0, 0)
        self.glDepthMask(0)
        self.glDepthFunc(self.EQUAL)
        self.glBeginQuery(self.SAMPLES_PASSED, query)
        draw()
        self.glEndQuery(self.SAMPLES_PASSED)
        self.glDepthFunc(self.GEQUAL)
        self.glDepthMask(1)
        self.glColorMask(1, 1, 1, 1)
        return query.value

    def result(self, query: int) -> int:
        """Waits for a query's count and frees it."""
        count = ctypes.c_uint()
        self.glGetQueryObjectuiv(query, self.QUERY_RESULT, ctypes.byref(count))
        self.glDeleteQueries(1, ctypes.byref(ctypes.c_uint(query)))
        return count.value
