/* labkit-screen: shows the console's text on the VGA screen of a guest whose kernel does not.
 *
 * A kernel that is entered by PVH, past the firmware's boot code, is told nothing of the screen and gives
 * its virtual consoles to a "dummy device": text is kept, and nowhere shown. This program copies it from
 * /dev/vcsa (the console in front: character and colour of each cell) to the VGA card's text memory,
 * whose cells look the same, each time the kernel says that it changed; and puts the card's cursor where
 * the console has it.
 *
 * Sources: vcs(4); the VGA's CRT controller registers 0x0e and 0x0f (cursor location, high and low byte).
 */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <poll.h>
#include <stdint.h>
#include <string.h>
#include <sys/io.h>
#include <unistd.h>

enum { COLUMNS = 80, LINES = 25, CELLS = COLUMNS * LINES };
enum { TEXT_MEMORY = 0xb8000, CRT_INDEX = 0x3d4 };

struct console {
    uint8_t lines, columns, x, y;
    uint8_t cells[2 * CELLS];
};

static void put_cursor(int x, int y)
{
    unsigned at = y * COLUMNS + x;

    /* Two ports side by side: which register (the low byte here), and its value (the high byte). */
    outw(0x0e | (at & 0xff00), CRT_INDEX);
    outw(0x0f | (at & 0xff) << 8, CRT_INDEX);
}

int main(void)
{
    struct console now, shown = {0};
    int console = open("/dev/vcsa", O_RDONLY | O_CLOEXEC);
    int memory = open("/dev/mem", O_WRONLY | O_CLOEXEC);

    if (console < 0 || memory < 0 || ioperm(CRT_INDEX, 2, 1) != 0)
        err(1, "the console or the screen cannot be opened");
    for (;;) {
        struct pollfd change = {.fd = console, .events = POLLPRI};

        if (pread(console, &now, sizeof now, 0) != sizeof now || now.lines != LINES || now.columns != COLUMNS)
            errx(1, "the console is not of %d by %d characters", COLUMNS, LINES);
        if (memcmp(now.cells, shown.cells, sizeof now.cells)
            && pwrite(memory, now.cells, sizeof now.cells, TEXT_MEMORY) != sizeof now.cells)
            err(1, "the screen's memory cannot be written");
        if (now.x != shown.x || now.y != shown.y)
            put_cursor(now.x, now.y);
        shown = now;
        poll(&change, 1, -1);
        /* Programs write in bursts, and nobody sees more than some twenty pictures in a second. */
        usleep(40000);
    }
}
