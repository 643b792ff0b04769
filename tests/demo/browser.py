"""A headless Chromium, driven by the DevTools protocol through a pair of pipes.

https://chromedevtools.github.io/devtools-protocol: messages are JSON, each ends in a
zero byte; the browser reads them from file descriptor 3 and answers on 4.
"""

import base64
import contextlib
import json
import os
import select
import subprocess
import time

_FLAGS = (
  "--headless",
  "--remote-debugging-pipe",
  "--no-sandbox",  # which root may not have; the page is our own
  "--disable-dev-shm-usage",  # small in containers
  "--disable-background-networking",
  "--disable-component-update",
  "--no-first-run",
  "--hide-scrollbars",
)
_PATIENCE = 60  # seconds for anything to happen, on a busy machine
# What Chromium answers to a script whose page is left or loaded again meanwhile.
_LEFT = ("Inspected target navigated or closed", "Execution context was destroyed")


class PageLeft(RuntimeError):
  """A script did not come to its end, since its page was left."""


class Browser:
  """One tab. Used as a context, which ends the browser."""

  def __init__(self, executable, profile, width=1280, height=1000):
    there, ours = os.pipe(), os.pipe()
    # bash, because descriptors are to have these very numbers.
    pipes = f'exec "$0" "$@" 3<&{there[0]} 4>&{ours[1]}'
    size = f"--window-size={width},{height}"
    self._process = subprocess.Popen(
      ["bash", "-c", pipes, executable, *_FLAGS, size, f"--user-data-dir={profile}"],
      pass_fds=(there[0], ours[1]),
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    os.close(there[0])
    os.close(ours[1])
    self._to, self._from = there[1], ours[0]
    self._received, self._number, self._session = b"", 0, None
    self.events = []
    target = self.do("Target.createTarget", url="about:blank")["targetId"]
    attached = self.do("Target.attachToTarget", targetId=target, flatten=True)
    self._session = attached["sessionId"]
    for domain in ("Page", "Network", "Runtime"):
      self.do(f"{domain}.enable")

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._session = None
    self.do("Browser.close")
    self._process.wait(_PATIENCE)
    os.close(self._to)
    os.close(self._from)

  def do(self, method, **parameters):
    """Calls a method of the protocol; events that come meanwhile are kept."""
    self._number += 1
    message = {"id": self._number, "method": method, "params": parameters}
    if self._session is not None:
      message["sessionId"] = self._session
    os.write(self._to, json.dumps(message).encode() + b"\0")
    while True:
      answer = self._next()
      if answer.get("id") != self._number:
        self.events.append(answer)
      elif "error" in answer:
        left = any(words in answer["error"]["message"] for words in _LEFT)
        kind = PageLeft if left else RuntimeError
        raise kind(f"{method}: {answer['error']}")
      else:
        return answer["result"]

  def run(self, script):
    """What an expression of JavaScript, or its promise, comes to.

    Raises:
      PageLeft: the page is left meanwhile, as it is for a while after a reload.
      RuntimeError: it cannot be evaluated.
    """
    answer = self.do(
      "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
    )
    if "exceptionDetails" in answer:
      raise RuntimeError(f"{script}: {answer['exceptionDetails']}")
    return answer["result"].get("value")

  def wait(self, script):
    """The first value of an expression that is true, on whatever page comes."""
    until = time.monotonic() + _PATIENCE
    while time.monotonic() < until:
      with contextlib.suppress(PageLeft):
        if value := self.run(script):
          return value
      time.sleep(0.1)
    raise TimeoutError(f"{script} did not come true. On the page: {self.text()}")

  def text(self):
    """All that is written on the page."""
    return self.run("document.body.innerText")

  def type(self, selector, text):
    """Puts a text in place of a field's, key by key as far as the page can tell."""
    self.run(f"document.querySelector({json.dumps(selector)}).select()")
    self.do("Input.insertText", text=text)

  def rest(self, selector):
    """The middle of an element, once it is there and has stopped moving."""
    found = f"document.querySelector({json.dumps(selector)})"
    self.wait(f"!!{found}")
    self.run(f"{found}.scrollIntoView({{block: 'nearest'}})")
    before, middle = None, []
    while middle != before:
      time.sleep(0.2)
      before, middle = (
        middle,
        self.run(
          "(({x, y, width, height}) => [x + width / 2, y + height / 2])"
          f"({found}.getBoundingClientRect())"
        ),
      )
    return middle

  def click(self, selector):
    """Presses the mouse in the middle of an element."""
    x, y = self.rest(selector)
    place = {"x": x, "y": y, "button": "left", "clickCount": 1}
    for kind in ("mousePressed", "mouseReleased"):
      self.do("Input.dispatchMouseEvent", type=kind, **place)

  def choose(self, selector, label):
    """Opens a drop-down and takes the choice of this name."""
    self.click(f"{selector} input")
    self.click(f"{selector} [role=option][aria-label='{label}']")

  def upload(self, selector, path):
    """Gives a file to a field for files."""
    self.wait(f"!!document.querySelector({json.dumps(selector)})")
    root = self.do("DOM.getDocument")["root"]["nodeId"]
    node = self.do("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
    self.do("DOM.setFileInputFiles", nodeId=node, files=[path])

  def fetch(self, address):
    """The bytes behind an address, as the page gets them."""
    script = (
      f"fetch({json.dumps(address)}).then(r => r.arrayBuffer()).then(b => "
      "btoa(Array.from(new Uint8Array(b), c => String.fromCharCode(c)).join('')))"
    )
    return base64.b64decode(self.run(script))

  def screenshot(self, path):
    """Writes what is to be seen as a PNG."""
    path.write_bytes(
      base64.b64decode(self.do("Page.captureScreenshot", format="png")["data"])
    )

  def download_to(self, folder):
    """Lets the page save files, in a folder that is made here."""
    folder.mkdir()
    self.do("Page.setDownloadBehavior", behavior="allow", downloadPath=str(folder))

  def downloaded(self, path):
    """The bytes of a file that the page saves, once it is there."""
    until = time.monotonic() + _PATIENCE
    while not path.exists():
      if time.monotonic() > until:
        raise TimeoutError(f"There is no {path.name} among {os.listdir(path.parent)}.")
      time.sleep(0.1)
    return path.read_bytes()

  def requests(self):
    """The addresses that the page has asked for."""
    self.do("Runtime.enable")  # whatever has happened so far comes before its answer
    return [
      event["params"]["request"]["url"]
      for event in self.events
      if event.get("method") == "Network.requestWillBeSent"
    ]

  def _next(self):
    while b"\0" not in self._received:
      if not select.select([self._from], [], [], _PATIENCE)[0]:
        raise TimeoutError("Chromium does not answer.")
      part = os.read(self._from, 1 << 20)
      if not part:
        raise EOFError(f"Chromium has ended with {self._process.wait(_PATIENCE)}.")
      self._received += part
    message, _, self._received = self._received.partition(b"\0")
    return json.loads(message)
